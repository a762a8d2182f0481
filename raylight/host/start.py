"""What is looked at when ComfyUI starts: its release, and whether the packages that Raylight needs are there.

One line in ComfyUI's log for each that is wrong. The nodes are registered all the same, so that a workflow opens, and
say it again where they are run.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path

from .release import MINIMUM, is_older, running

logger = logging.getLogger(__name__)

REQUIRED = ("ray", "safetensors")
_REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"


def announce() -> None:
    """Log what is wrong, if anything. Imports none of the packages."""
    version = running()
    if is_older(version):
        logger.warning("Raylight is made for ComfyUI %s or later, and this is %s: update ComfyUI if its nodes do not "
                       "work", MINIMUM, version)
    absent = [name for name in REQUIRED if not _is_there(name)]
    if absent:
        logger.warning("%s", advice(absent))


def advice(absent: list[str]) -> str:
    """What to do about packages that are not there."""
    which = f"package {absent[0]}" if len(absent) == 1 else f"packages {' and '.join(absent)}"
    return (f"Raylight needs the Python {which}, and its nodes cannot run without: run "
            f'"{sys.executable}" -m pip install -r "{_REQUIREMENTS}" and restart ComfyUI')


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
