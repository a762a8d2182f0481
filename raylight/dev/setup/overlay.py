"""An environment for another release of ComfyUI, with only the packages that it needs in other versions than .venv.

PyTorch alone is 5 GB, so it is shared: a path file makes Python search the environment below for what is missing on
top. pip sees both, installs only what is missing or has another version, and never changes the one below.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from raylight.dev.setup.environment import TORCH, Environment, Requirements
from raylight.dev.setup.report import SetupError, say

PATH_FILE = "raylight-below.pth"


def overlay_root(checkout: Path, version: str) -> Path:
    """Return the path of a release's environment: .venv-0.24 for 0.24.0, .venv-own for one that has no version."""
    return checkout / f".venv-{version.rpartition('.')[0] or 'own'}"


def create_over(below: Environment, root: Path) -> Environment:
    """Create the environment if it is missing, over `below` and with its Python. It has no pip of its own."""
    environment = Environment(root)
    if not os.path.lexists(environment.python):
        say(f"making the environment {root}, over {below.root.name}")
        try:
            subprocess.run([str(below.python), "-I", "-m", "venv", "--without-pip", str(root)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SetupError(f"the environment {root} could not be made: {error}. Delete it and run again.") from error
    environment.version()
    # Written each time: the checkout, and .venv with it, may have been moved.
    (environment.packages() / PATH_FILE).write_text(f"{below.packages()}\n", "utf-8")
    return environment


def requirements_over(below: Environment, comfyui: Path) -> Requirements:
    """Return the release's requirements. They include the state of `below`, which can change what is missing on top."""
    file = comfyui / "requirements.txt"
    if not file.is_file():
        raise SetupError(f"{file} is missing. Delete {comfyui} and run again.")
    return Requirements((file,), TORCH, below.stamp.read_text("utf-8"))
