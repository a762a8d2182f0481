"""The proof of a way to split forwards: without exchanges first, then for real, then compared with the whole forward.

All ranks go through the same steps. In the trial without exchanges each rank takes the part of every rank in turn, so
an error is an error of all of them at the same place, and no rank is left waiting in a collective. What is computed for
real after that has shapes that are known to fit, and needs less memory than the whole forward before it. It is compared
for the forward that came, and for another of the same kind: what matters little in one step may matter in others.

In 16 bits a difference at a few places may be an error at the border of shards, or the rounding of a model that rounds
some places more than others; a small one of all places may be that of many layers. Where that is the question, the
whole forward is repeated with the last bits of its latent changed, which says how much rounding alone does.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from raylight.cluster.errors import is_out_of_memory
from raylight.parallel.heartbeat import cancellation_point
from raylight.parallel.plan import SequencePlan
from raylight.parallel.process_group import alike, any_rank
from raylight.plans.draft.proof import difference, may_be_rounding

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
class Inputs:
    """The arguments of a repeated forward: those that came, or `other` ones of their kind; with the last bits of the
    latent changed if `nudged`.
    """

    other: bool = False
    nudged: bool = False


AS_THEY_CAME = Inputs()


@dataclass(frozen=True)
class Outcome:
    """The way that is proven, with its difference as a share of what is allowed; or why there is none."""

    way: Way | None = None
    share: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Forward:
    """The forward to be proven. `compute(way, rank, inputs)` repeats it, or another of its kind as `inputs` says; as
    `rank` alone without exchanges if that is not None. `recover` makes the model usable after an error of all ranks.
    The rest is what the output is compared with, the number of ranks that split tokens, whether the model computes in
    16 bits, and whether its weights are sharded, so that every forward is collective.
    """

    compute: Callable[[Way, int | None, Inputs], Any]
    recover: Callable[[], None]
    whole: Any
    degree: int
    in_16_bits: bool
    is_sharded: bool = False

    def prove(self, ways: Sequence[Way]) -> Outcome:
        """Return the first of `ways` with an output equal to `whole`. Collective.

        Raises RunCancelled: if a rank was asked to cancel. Raises what PyTorch does out of memory, if other ranks may
        be in a collective.
        """
        reasons, computed, wholes = [], 0, {AS_THEY_CAME: self.whole}
        for way in ways[:_TRIED]:
            cancellation_point()
            reason = self._simulated(way) if way.plan is not None else ""
            if not reason:
                computed += 1
                share, reason = self._compared(way, wholes)
                if not reason:
                    return Outcome(way, share)
            reasons.append(reason)
            if computed == _COMPUTED:
                break
        logger.debug("no way is equal to the whole forward: %s", reasons)
        return Outcome(reason=reasons[-1] if reasons else "")

    def _compared(self, way: Way, wholes: dict[Inputs, Any]) -> tuple[float, str]:
        """Return the difference as a share of what is allowed, and why this way is not equal, "" if it is. `wholes` are
        whole outputs, or errors, to which those that are needed are added. Collective.
        """
        largest = 0.0
        for other in (False, True):
            whole = self._whole(Inputs(other), wholes)
            result = self._attempt(way, None, Inputs(other))
            failed = [one for one in (whole, result) if isinstance(one, Exception)]
            share = float("inf") if failed else difference(whole, result, self.in_16_bits)
            if self.in_16_bits and any_rank(not share <= 1.0):
                if not any_rank(bool(failed) or not may_be_rounding(whole, result)):
                    rounded = self._whole(Inputs(other, nudged=True), wholes)
                    failed = [rounded] if isinstance(rounded, Exception) else []
                    share = float("inf") if failed else difference(whole, result, True, rounded)
            del result
            if any_rank(not share <= 1.0):
                if failed:
                    return share, f"{type(failed[0]).__name__}: {failed[0]}"
                return share, f"its output differs, {share:.3g} of the limit on this worker"
            largest = max(largest, share)
        return largest, ""

    def _whole(self, inputs: Inputs, wholes: dict[Inputs, Any]) -> Any:
        """Return the output of the whole forward, or the error. Collective if weights are sharded."""
        if inputs not in wholes:
            wholes[inputs] = self._attempt(WHOLE, None, inputs)
        return wholes[inputs]

    def _simulated(self, way: Way) -> str:
        """Return why this way does not work on some rank, "" if it does on all. Collective."""
        reason = ""
        for rank in range(self.degree):
            result = self._attempt(way, rank, AS_THEY_CAME)
            if isinstance(result, Exception):
                reason = f"{type(result).__name__}: {result}"
                break
        return (reason or "another worker met an error") if any_rank(bool(reason)) else ""

    def _attempt(self, way: Way, rank: int | None, inputs: Inputs) -> Any:
        """Return the output, or the error."""
        try:
            return self.compute(way, rank, inputs)
        except Exception as error:  # whatever a model raises for tensors of other shapes than its own
            if is_out_of_memory(error) and (rank is None or self.is_sharded):
                raise  # of this rank only, maybe, while others wait for it
            self.recover()
            return error.with_traceback(None)  # which would keep all tensors of the forward


def is_same_everywhere(text: bytes) -> bool:
    """Return whether all ranks have the same text. Collective."""
    return alike(int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))
