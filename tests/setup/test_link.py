"""The link in custom_nodes: made once, and never over something else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raylight.dev.setup import bootstrap, comfyui
from raylight.dev.setup.link import link_into
from raylight.dev.setup.report import SetupError


@pytest.fixture
def host(tmp_path: Path) -> Path:
    (tmp_path / "host" / "custom_nodes").mkdir(parents=True)
    return tmp_path / "host"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "src").mkdir()
    return tmp_path / "src"


def entries(host: Path) -> list[str]:
    return sorted(path.name for path in (host / "custom_nodes").iterdir())


def test_links_once(host: Path, checkout: Path) -> None:
    entry, made = link_into(host, checkout)
    assert made and entry == host / "custom_nodes" / "raylight" and entry.samefile(checkout)
    assert link_into(host, checkout) == (entry, False)
    assert entries(host) == ["raylight"]


def test_keeps_link_of_other_name(host: Path, checkout: Path) -> None:
    mine = host / "custom_nodes" / "my-raylight"
    mine.symlink_to(checkout)
    assert link_into(host, checkout) == (mine, False)
    assert entries(host) == ["my-raylight"]


def test_ignores_disabled_link(host: Path, checkout: Path) -> None:
    (host / "custom_nodes" / "raylight.disabled").symlink_to(checkout)
    assert link_into(host, checkout)[1]


def test_checkout_in_place_needs_no_link(host: Path) -> None:
    inside = host / "custom_nodes" / "ComfyUI-Raylight"
    inside.mkdir()
    assert link_into(host, inside) == (inside, False)
    assert entries(host) == ["ComfyUI-Raylight"]


@pytest.mark.skipif(os.name == "nt", reason="a junction is never relative")
def test_moved_checkout_keeps_link(checkout: Path) -> None:
    (checkout / ".comfyui" / "ComfyUI" / "custom_nodes").mkdir(parents=True)
    link_into(checkout / ".comfyui" / "ComfyUI", checkout)
    moved = checkout.rename(checkout.parent / "moved")
    entry, made = link_into(moved / ".comfyui" / "ComfyUI", moved)
    assert not made and entry.samefile(moved)


@pytest.mark.parametrize("kind", ["another directory", "a file", "a link to", "a broken link to"])
def test_rejects_other_raylight(host: Path, checkout: Path, tmp_path: Path, kind: str) -> None:
    foreign = host / "custom_nodes" / "raylight"
    other = tmp_path / "other"
    if kind == "another directory":
        foreign.mkdir()
    elif kind == "a file":
        foreign.write_text("mine")
    else:
        foreign.symlink_to(other)
        if kind == "a link to":
            other.mkdir()
    before = foreign.lstat()

    with pytest.raises(SetupError, match=f"exists and is {kind}"):
        link_into(host, checkout)
    assert foreign.lstat() == before and entries(host) == ["raylight"]


def test_checks_place_before_install(host: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (host / "custom_nodes" / "raylight").mkdir()
    monkeypatch.setattr(bootstrap.comfyui, "find", lambda *_: comfyui.ComfyUI(host, "set"))
    monkeypatch.setattr(bootstrap.environment, "create", lambda *_: pytest.fail("an environment is made"))
    with pytest.raises(SetupError, match="another directory, not this checkout"):
        bootstrap.set_up([checkout])
