"""Variables of the environment in which the user gives a number for each worker."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

EQUAL = "equal"
N = TypeVar("N", int, float)


def setting(variable: str) -> str:
    """Return what a variable is set to, "" for nothing."""
    return os.environ.get(variable, "").strip()


def numbers(variable: str, workers: int, number: Callable[[str], N], noun: str, how: str) -> tuple[N, ...]:
    """Return the numbers of a variable that is set, one for each of so many workers.

    Raises ValueError: when they are no numbers (`noun` is what they should be), or not as many; it ends with `how` to
    set them.
    """
    text = setting(variable)
    try:
        found = tuple(number(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{variable} = {text} are no {noun}: {how}") from None
    if len(found) != workers:
        raise ValueError(f"{variable} = {text} has {len(found)} {noun} for {workers} workers: {how}")
    return found
