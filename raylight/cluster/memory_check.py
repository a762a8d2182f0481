"""The memory of the workers' GPUs, by which they hold sharded weights: of the GPUs, or given by the user."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from raylight.parallel.shares import Weights

from .for_each_worker import EQUAL, numbers, setting
from .place import Place

VARIABLE = "RAYLIGHT_MEMORY"
_HOW = f"set {VARIABLE} to the GB of each worker, such as 24,16, to {EQUAL}, or unset it"
_ALIKE_WITHIN = 1.05  # times the smaller memory: GPUs of one size differ by what their drivers keep


def memory_of(places: Mapping[int, Place]) -> Weights:
    """Return the bytes of each worker's GPU, or the user's; `()` if they are alike, or not known.

    Raises ValueError: when the user's are no numbers, or not as many.
    """
    on_gpu = Counter(_gpu(place) for place in places.values())
    return unlike([place.memory_bytes // on_gpu[_gpu(place)] for place in places.values()])


def unlike(memory: Sequence[int]) -> Weights:
    """Return these bytes, or what the user gives instead; `()` if they are alike, or one is 0.

    Raises ValueError: as `memory_of`.
    """
    memory = _given(len(memory)) or tuple(memory)
    if len(memory) < 2 or min(memory) == 0 or max(memory) <= _ALIKE_WITHIN * min(memory):
        return ()
    return memory


def describe(places: Mapping[int, Place], memory: Weights) -> list[str]:
    """Return in lines by which memory workers hold sharded weights; nothing if they hold equally much."""
    if not memory:
        return []
    each = ", ".join(f"{places[rank].name} {nbytes / 1e9:.1f} GB" for rank, nbytes in enumerate(memory))
    return [
        f"the workers' memory is unlike: {each}. With FSDP each holds so much of the weights that as much is left on "
        f"one as on the others"
    ]


def _given(workers: int) -> Weights:
    """Return the bytes that the user gives to so many workers, () if none."""
    text = setting(VARIABLE)
    if not text or workers == 1:
        return ()
    if text == EQUAL:
        return (1,) * workers
    memory = numbers(VARIABLE, workers, float, "numbers", _HOW)
    if not all(math.isfinite(one) and one * 1e9 >= 1 for one in memory):
        raise ValueError(f"{VARIABLE} = {text} has a number that is not above 0: {_HOW}")
    return tuple(int(one * 1e9) for one in memory)


def _gpu(place: Place) -> tuple[str, int | None]:
    return place.node, place.gpu
