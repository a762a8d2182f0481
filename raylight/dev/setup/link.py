"""A link by which ComfyUI finds the checkout among its custom nodes."""

from __future__ import annotations

import os
from pathlib import Path

from raylight.dev.setup.report import SetupError

NAME = "raylight"


def link_into(comfyui: Path, checkout: Path) -> tuple[Path, bool]:
    """Link `checkout` into comfyui/custom_nodes. Return the entry there, and whether it is new.

    Nothing is created if the checkout, or a link to it of any name, is already there. Raises SetupError: as
    `check_place`.
    """
    custom_nodes = comfyui / "custom_nodes"
    existing = _entry_of(checkout, custom_nodes)
    if existing is not None:
        return existing, False
    check_place(comfyui, checkout)
    target = custom_nodes / NAME
    try:
        custom_nodes.mkdir(exist_ok=True)
        _make_link(checkout, target)
    except OSError as error:
        raise SetupError(f"{target} could not be made a link to {checkout}: {error}. Make it yourself.") from error
    return target, True


def check_place(comfyui: Path, checkout: Path) -> None:
    """Check that custom_nodes/raylight is free or this checkout. Raises SetupError: it is something else."""
    target = comfyui / "custom_nodes" / NAME
    if os.path.lexists(target) and _entry_of(checkout, target.parent) is None:
        raise SetupError(
            f"{target} exists and is {_describe(target)}, not this checkout ({checkout}). Move it away if you want "
            "this checkout in that ComfyUI, or set COMFYUI_PATH to another ComfyUI."
        )


def _entry_of(checkout: Path, custom_nodes: Path) -> Path | None:
    """Return the entry of custom_nodes that is this checkout and that ComfyUI would load."""
    if not custom_nodes.is_dir():
        return None
    for entry in sorted(custom_nodes.iterdir()):
        # is_dir() is False for a link to nowhere, which samefile() would fail on.
        if not entry.name.endswith(".disabled") and entry.is_dir() and entry.samefile(checkout):
            return entry
    return None


def _make_link(checkout: Path, target: Path) -> None:
    if os.name == "nt":
        import _winapi  # a symlink needs a privilege on Windows, a junction does not

        _winapi.CreateJunction(str(checkout), str(target))
        return
    # Relative inside the checkout, so that a moved or copied checkout does not run the nodes of the old one.
    inside = checkout.resolve() in target.resolve().parents
    source = os.path.relpath(checkout.resolve(), target.parent.resolve()) if inside else str(checkout)
    target.symlink_to(source, target_is_directory=True)


def _describe(path: Path) -> str:
    if path.is_symlink():
        kind = "a link" if path.exists() else "a broken link"
        return f"{kind} to {os.readlink(path)}"
    return "another directory" if path.is_dir() else "a file"
