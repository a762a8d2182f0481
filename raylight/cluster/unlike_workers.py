"""What is said of workers that are unlike."""

from __future__ import annotations

from collections.abc import Mapping

from raylight.parallel.degrees import Arrangement

from . import memory_check, speed_check
from .place import Place


def describe(places: Mapping[int, Place], arrangement: Arrangement) -> list[str]:
    """Return in lines how workers of unlike speed or memory share work and weights; nothing if they are alike."""
    return [*speed_check.describe(places, arrangement), *memory_check.describe(places, arrangement.memory)]
