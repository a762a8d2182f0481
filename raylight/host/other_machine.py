"""ComfyUI on another machine than that of its own process: the versions must be the same, the model folders differ."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path

from raylight.cluster.ray_environment import MODEL_PATHS_VARIABLE

_OWN_PATHS = "extra_model_paths.yaml"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PACKAGE = Path(__file__).resolve().parents[1]


@functools.cache
def identity() -> str:
    """Return what tells this machine, or container, from others: its name and the id of its last start."""
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    return f"{platform.node()} {boot}"


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions on which results and messages depend; that of Raylight is a digest of its code."""
    import comfyui_version  # this module must be importable before ComfyUI is set up
    import torch

    code = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        if "dev" not in path.relative_to(_PACKAGE).parts:
            code.update(path.relative_to(_PACKAGE).as_posix().encode() + path.read_bytes())
    return {
        "ComfyUI": comfyui_version.__version__,
        "PyTorch": torch.__version__.partition("+")[0],
        "Raylight's code": code.hexdigest()[:12],
    }


def check_versions(expected: Mapping[str, str]) -> None:
    """Raise ValueError: when this machine has other versions than ComfyUI's."""
    here = versions()
    differing = [
        f"{name} {here[name]} and not {version}" for name, version in expected.items() if here[name] != version
    ]
    if differing:
        raise ValueError(
            f"the machine {platform.node()} has {', '.join(differing)}, which the machine of ComfyUI has: install the "
            f"same there (ComfyUI is in {os.path.dirname(_comfyui())}, Raylight in {_PACKAGE.parent}), and start Ray "
            f"there again"
        )


def add_model_folders(of_comfyui: Mapping[str, tuple[Iterable[str], Iterable[str]]]) -> None:
    """Have `folder_paths` know this machine's model folders, as ComfyUI here would, and after them those of ComfyUI's
    machine: a file server may have them at the same path.
    """
    import folder_paths
    from utils.extra_config import load_extra_path_config

    own = os.path.join(os.path.dirname(_comfyui()), _OWN_PATHS)
    for path in [own, *filter(None, os.environ.get(MODEL_PATHS_VARIABLE, "").split(os.pathsep))]:
        if path != own or os.path.isfile(own):
            load_extra_path_config(path)
    known = folder_paths.folder_names_and_paths
    for kind, (folders, extensions) in of_comfyui.items():
        here, types = known.get(kind, ([], set()))
        known[kind] = (list(dict.fromkeys([*here, *folders])), {*types, *extensions})


def _comfyui() -> str:
    import comfyui_version

    return os.path.abspath(comfyui_version.__file__)
