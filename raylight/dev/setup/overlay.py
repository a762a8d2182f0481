"""An environment for another release of ComfyUI: the packages that it wants in other versions, over those of .venv.

PyTorch alone is 5 GB, so it is shared: a path file has Python look into the environment below for all that is not in
the one on top. pip sees both, installs only what is missing or has another version, and never changes the one below.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from raylight.dev.setup.environment import TORCH, Environment, Requirements
from raylight.dev.setup.report import SetupError, say

PATH_FILE = "raylight-below.pth"


def overlay_root(checkout: Path, version: str) -> Path:
    """Where the environment of a release lies: .venv-0.24 for 0.24.0."""
    return checkout / f".venv-{version.rpartition('.')[0]}"


def create_over(below: Environment, root: Path) -> Environment:
    """Make the environment if it is not there, over `below` and with its Python. It has no pip of its own."""
    environment = Environment(root)
    if not os.path.lexists(environment.python):
        say(f"making the environment {root}, over {below.root.name}")
        try:
            subprocess.run([str(below.python), "-I", "-m", "venv", "--without-pip", str(root)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SetupError(f"the environment {root} could not be made: {error}. Delete it and run again.") from error
    environment.version()
    # Anew each time: the checkout, and .venv with it, may have been moved.
    (environment.packages() / PATH_FILE).write_text(f"{below.packages()}\n", "utf-8")
    return environment


def requirements_over(below: Environment, comfyui: Path) -> Requirements:
    """What the release asks for. Changes below can change what is missing on top, so they count."""
    file = comfyui / "requirements.txt"
    if not file.is_file():
        raise SetupError(f"{file} is missing. Delete {comfyui} and run again.")
    return Requirements((file,), TORCH, below.stamp.read_text("utf-8"))
