"""Which ComfyUI is used, and what is never mistaken for one."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tarfile
from pathlib import Path

import pytest

from raylight.dev.setup import comfyui
from raylight.dev.setup.report import SetupError
from raylight.driver.preflight import MINIMUM

FILES = {"main.py": b"", "nodes.py": b"", "comfy/ops.py": b"", "comfyui_version.py": b'__version__ = "0.30.0"\n'}


def make_comfyui(root: Path) -> Path:
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "custom_nodes").mkdir()
    return root


def make_archive(path: Path, files: dict[str, bytes], link: tuple[str, str] | None = None) -> str:
    """Write a .tar.gz of these entries, and return its sha256."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        if link is not None:
            info = tarfile.TarInfo(link[0])
            info.type, info.linkname = tarfile.SYMTYPE, link[1]
            tar.addfile(info)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def vendored(**more: bytes) -> dict[str, bytes]:
    return {f"pkg-1/vendor/ComfyUI/{name}": content for name, content in {**FILES, **more}.items()}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout in the custom_nodes of a ComfyUI."""
    path = make_comfyui(tmp_path / "host") / "custom_nodes" / "pack"
    path.mkdir()
    return path


def test_finding_order(tmp_path: Path, checkout: Path) -> None:
    own = make_comfyui(tmp_path / "own")
    make_comfyui(comfyui.cached_root(checkout))

    assert comfyui.find([checkout], {"COMFYUI_PATH": str(own)}).root == own
    assert comfyui.find([checkout], {"COMFYUI_PATH": ""}).root == tmp_path / "host"
    elsewhere = checkout.rename(tmp_path / "elsewhere")
    assert comfyui.find([elsewhere], {}).root == comfyui.cached_root(elsewhere)
    assert comfyui.find([tmp_path / "own"], {}) is None


def test_finds_through_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = make_comfyui(tmp_path / "host")
    real = tmp_path / "src" / "raylight"
    script = Path("raylight", "dev", "setup", "bootstrap.py")
    (real / script).parent.mkdir(parents=True)
    (real / script).touch()
    link = host / "custom_nodes" / "anything"
    link.symlink_to(real)

    assert comfyui.checkout_paths(str(real / script), {}) == [real]
    paths = comfyui.checkout_paths(str(link / script), {})
    assert paths == [real, link]
    assert comfyui.find(paths, {}).root == host

    monkeypatch.chdir(link)  # like a shell, which records its path only in PWD
    assert comfyui.checkout_paths(str(script), {"PWD": str(link)}) == [real, link]
    assert comfyui.checkout_paths(str(script), {"PWD": str(tmp_path)}) == [real]


def test_version(tmp_path: Path) -> None:
    root = make_comfyui(tmp_path / "host")
    found = comfyui.ComfyUI(root, "")
    assert found.version == "0.30.0" and found.is_supported
    (root / "comfyui_version.py").write_text("__version__ = '0.4.12'\n")
    assert not found.is_supported
    (root / "comfyui_version.py").unlink()
    assert "unknown" in found.version and found.is_supported


def test_pinned() -> None:
    assert comfyui.pinned("0.24") == comfyui.pinned("0.24.0") == "0.24.0"
    assert comfyui.pinned("0.30") == comfyui.DEFAULT_VERSION == list(comfyui.PINNED)[-1]
    assert next(iter(comfyui.PINNED)) == MINIMUM, "the oldest release that is tested is the oldest that is promised"


@pytest.mark.parametrize("name", ["0.2", "0", "", "0.25", "/my/ComfyUI"])
def test_rejects_unknown_release(name: str) -> None:
    with pytest.raises(SetupError, match=f"COMFYUI = {name} is no release .* choose one of 0.24, 0.27, 0.30"):
        comfyui.pinned(name)


def test_registry_has_same_minimum() -> None:
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert f'requires-comfyui = ">={MINIMUM}"' in text


def test_unpacks_only_comfyui(tmp_path: Path) -> None:
    archive, target = tmp_path / "a.tar.gz", tmp_path / "ComfyUI"
    files = {**vendored(), "pkg-1/setup.py": b"", "pkg-1/vendor/other/main.py": b""}
    comfyui.unpack(archive, make_archive(archive, files, link=("pkg-1/vendor/ComfyUI/link", "/")), target)

    assert sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()) == sorted(FILES)
    assert not os.path.lexists(target / "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ComfyUI", "a.tar.gz"]


def test_ignores_interrupted_unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "a.tar.gz"
    sha256 = make_archive(archive, vendored())
    target = comfyui.cached_root(tmp_path)
    target.parent.mkdir()

    def interrupt(path: Path, to: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", interrupt)
        comfyui.unpack(archive, sha256, target)
    assert comfyui.find([tmp_path], {}) is None
    assert list(target.parent.iterdir()) == []

    make_comfyui(target.parent / ".unpack-killed" / "ComfyUI")  # left by a kill
    target.mkdir()
    (target / "main.py").touch()
    assert comfyui.find([tmp_path], {}) is None
    comfyui.unpack(archive, sha256, target)
    assert comfyui.find([tmp_path], {}).root == target


def test_rejects_wrong_comfyui_path(tmp_path: Path, checkout: Path) -> None:
    with pytest.raises(SetupError, match=f"COMFYUI_PATH is {tmp_path}, which is not a ComfyUI"):
        comfyui.find([checkout], {"COMFYUI_PATH": str(tmp_path)})


def test_rejects_wrong_hash(tmp_path: Path) -> None:
    archive, target = tmp_path / "a.tar.gz", tmp_path / "ComfyUI"
    sha256 = make_archive(archive, vendored())
    with pytest.raises(SetupError, match=f"sha256 {sha256}, but {'0' * 64} is expected"):
        comfyui.unpack(archive, "0" * 64, target)
    assert not target.exists()


@pytest.mark.parametrize("name", ["../../../../evil", "comfy/../../../../../evil"])
def test_rejects_path_traversal(tmp_path: Path, name: str) -> None:
    archive, target = tmp_path / "a.tar.gz", tmp_path / "inside" / "ComfyUI"
    target.parent.mkdir()
    sha256 = make_archive(archive, vendored(**{name: b"evil"}))
    with pytest.raises(SetupError, match="leaves its directory"):
        comfyui.unpack(archive, sha256, target)
    assert not target.exists() and not list(tmp_path.rglob("evil"))


def test_rejects_incomplete_archive(tmp_path: Path) -> None:
    archive, target = tmp_path / "a.tar.gz", tmp_path / "ComfyUI"
    make_archive(archive, vendored(big=os.urandom(100_000)))
    archive.write_bytes(archive.read_bytes()[:50_000])
    with pytest.raises(SetupError, match="not a readable archive"):
        comfyui.unpack(archive, hashlib.sha256(archive.read_bytes()).hexdigest(), target)

    sha256 = make_archive(archive, {"pkg-1/setup.py": b""})
    with pytest.raises(SetupError, match="holds no vendor/ComfyUI"):
        comfyui.unpack(archive, sha256, target)
    assert not target.exists()


def test_puts_comfyui_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", ["other"])
    monkeypatch.delenv("COMFYUI_PATH")
    with pytest.raises(SystemExit, match="there is no ComfyUI yet: run `make setup`, or set COMFYUI_PATH"):
        comfyui.put_on_path(tmp_path)
    make_comfyui(comfyui.cached_root(tmp_path))
    comfyui.put_on_path(tmp_path)
    assert sys.path == [str(comfyui.cached_root(tmp_path)), "other"]
