"""The proof of a way to split forwards: without exchanges first, then for real, then compared with the whole forward.

All ranks go through the same steps. In the trial without exchanges each rank takes the part of every rank in turn, so
an error is an error of all of them at the same place, and no rank is left waiting in a collective. What is computed for
real after that has shapes that are known to fit, and needs less memory than the whole forward before it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from raylight.parallel.plan import SequencePlan
from raylight.parallel.process_group import alike, any_rank
from raylight.plans.draft.proof import difference

logger = logging.getLogger(__name__)

_TRIED = 24  # ways at most
_COMPUTED = 8  # of them for real at most


@dataclass(frozen=True)
class Way:
    """How forwards are computed: tokens split by a plan, or batch rows split, or whole on every rank."""

    plan: SequencePlan | None = None
    rows: bool = False


WHOLE = Way()
ROWS = Way(rows=True)


@dataclass(frozen=True)
class Outcome:
    """The way that is proven, with its difference as a share of what is allowed; or why there is none."""

    way: Way | None = None
    share: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Forward:
    """The forward to be proven. `compute(way, rank)` repeats it, as `rank` alone without exchanges if that is not None;
    `recover` makes the model usable after an error of all ranks. The rest is what the output is compared with, the
    number of ranks that split tokens, and whether the model computes in 16 bits.
    """

    compute: Callable[[Way, int | None], Any]
    recover: Callable[[], None]
    whole: Any
    degree: int
    in_16_bits: bool

    def prove(self, ways: Sequence[Way]) -> Outcome:
        """Return the first of `ways` with an output equal to `whole`. Collective."""
        reasons, computed = [], 0
        for way in ways[:_TRIED]:
            reason = self._simulated(way) if way.plan is not None else ""
            if reason:
                reasons.append(reason)
                continue
            computed += 1
            result = self._attempt(way, None)
            failed = isinstance(result, Exception)
            share = 0.0 if failed else difference(self.whole, result, self.in_16_bits)
            reason = f"{type(result).__name__}: {result}" if failed else f"its output differs, {share:.3g} of the limit"
            del result
            if not any_rank(failed or not share <= 1.0):
                return Outcome(way, share)
            reasons.append(reason)
            if computed == _COMPUTED:
                break
        logger.debug("no way is equal to the whole forward: %s", reasons)
        return Outcome(reason=reasons[-1] if reasons else "")

    def _simulated(self, way: Way) -> str:
        """Return why this way does not work on some rank, "" if it does on all. Collective."""
        reason = ""
        for rank in range(self.degree):
            result = self._attempt(way, rank)
            if isinstance(result, Exception):
                reason = f"{type(result).__name__}: {result}"
                break
        return (reason or "another worker met an error") if any_rank(bool(reason)) else ""

    def _attempt(self, way: Way, rank: int | None) -> Any:
        """Return the output, or the error."""
        try:
            return self.compute(way, rank)
        except Exception as error:  # whatever a model raises for tensors of other shapes than its own
            self.recover()
            return error.with_traceback(None)  # which would keep all tensors of the forward


def is_same_everywhere(text: bytes) -> bool:
    """Return whether all ranks have the same text. Collective."""
    return alike(int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))
