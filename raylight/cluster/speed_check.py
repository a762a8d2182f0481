"""The speeds of the workers: tried once for a set of GPUs, or given by the user."""

from __future__ import annotations

from collections.abc import Mapping

from raylight.parallel.degrees import Arrangement, gain
from raylight.parallel.shares import ALIKE, Speeds
from raylight.parallel.speed_trial import ALIKE_WITHIN, ONE_KIND_WITHIN, Trial

from .bandwidth_check import Key, key_of
from .for_each_worker import EQUAL, numbers, setting
from .place import Place

VARIABLE = "RAYLIGHT_SPEEDS"
MEASURE = "measure"
_HOW = f"set {VARIABLE} to one whole number for each worker, such as 2,1, to {EQUAL}, or unset it"
TIMEOUT_S = 60.0  # the first product of a process loads libraries

_known: dict[Key, Trial] = {}


def known(places: Mapping[int, Place]) -> Trial | None:
    """Return what these GPUs have done in a trial before, in this process."""
    return _known.get(key_of(places))


def keep(places: Mapping[int, Place], trial: Trial) -> None:
    """Keep what a trial has found."""
    _known[key_of(places)] = trial


def given(world_size: int) -> Speeds | None:
    """Return the speeds that the user gives to so many workers, None if they are to be measured.

    Raises ValueError: when they are no speeds, or not as many.
    """
    text = setting(VARIABLE)
    if text in ("", MEASURE) or world_size == 1:
        return None
    if text == EQUAL:
        return ALIKE
    speeds = numbers(VARIABLE, world_size, int, "speeds", _HOW)
    if min(speeds) < 1:
        raise ValueError(f"{VARIABLE} = {text} has a speed below 1: {_HOW}")
    return ALIKE if len(set(speeds)) == 1 else Speeds(speeds, speeds)


def is_wanted(places: Mapping[int, Place]) -> bool:
    """Return whether a trial is to be made. Workers on a CPU share it, and only differ by chance."""
    if len(places) == 1 or known(places) is not None or given(len(places)) is not None:
        return False
    return setting(VARIABLE) == MEASURE or all(place.gpu is not None for place in places.values())


def speeds_of(places: Mapping[int, Place]) -> Speeds:
    """Return the speeds by which these workers share the work; alike if they are not known."""
    speeds, trial = given(len(places)), known(places)
    if speeds is None:
        is_one_kind = len({place.device for place in places.values()}) == 1
        within = ONE_KIND_WITHIN if is_one_kind else ALIKE_WITHIN
        speeds = ALIKE if trial is None else trial.speeds(within)
    return speeds


def describe(places: Mapping[int, Place], arrangement: Arrangement) -> list[str]:
    """Return in lines how unlike workers share the work, and what that gains; nothing if they are alike."""
    speeds = arrangement.speeds
    if speeds == ALIKE:
        return []
    fastest = max(speeds.overall)
    each = ", ".join(f"{places[rank].name} {100 * speed / fastest:.0f} %" for rank, speed in enumerate(speeds.overall))
    first, shared, equal = speeds.overall.index(fastest), gain(arrangement), gain(arrangement, by_speed=False)
    lines = [
        f"the workers' speeds are unlike ({'given' if given(len(places)) else 'measured'}): {each}. Each gets tokens, "
        f"heads and rows by its speed: about {shared:.2f} times as fast as rank {first} alone, with equal shares "
        f"{equal:.2f} times"
    ]
    if shared < 1:
        rest = sum(speeds.overall) / fastest - 1
        lines.append(
            f"rank {first} alone would be faster: the others add {100 * rest:.0f} % of its speed, and what all "
            f"exchange takes more. Choose GPU = 1 and its GPU by GPU_SELECT, if the model fits there"
        )
    return lines
