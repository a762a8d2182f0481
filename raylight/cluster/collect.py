"""Waiting for all ranks at once: events, cancel, faults, and the first failure."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError

from .actor import Cancelled
from .diagnosis import Fault, WorkerStates, cause_of, is_of_peers, is_store_full, root_cause, store_full, to_error
from .errors import HUNG, RunCancelled, is_out_of_memory

POLL_S = 0.1
# How long the other ranks get to end after the first failure. A ValueError is most likely a refusal, to which
# every rank comes in its own time; after anything else they may be stuck in a collective for good.
GRACE_S = 3.0
REFUSAL_GRACE_S = 60.0
VERDICT_S = 3.0
_NUMBER = re.compile(r"0x[0-9a-fA-F]+|\d+")


@dataclass(slots=True)
class Outcome:
    """How each rank ended, in the order in which they did.

    `fault` was found by the watchdog; `overdue` tells that ranks did not end after a cancel; `interruption` is what the
    listener raised."""

    results: dict[int, Any] = field(default_factory=dict)
    failures: dict[int, BaseException] = field(default_factory=dict)
    unfinished: set[int] = field(default_factory=set)
    fault: Fault | None = None
    overdue: bool = False
    interruption: BaseException | None = None

    @property
    def is_clean(self) -> bool:
        """Whether every rank has ended as it should, so that they can work again."""
        return not (self.failures or self.unfinished or self.fault or self.overdue)


@dataclass(frozen=True, slots=True)
class WaitOptions:
    """What a wait heeds besides the ranks. `is_overdue` is asked, with the seconds since, after a cancel."""

    on_event: Callable[[Any], None] = lambda _: None
    wants_cancel: Callable[[], bool] = lambda: False
    cancel: Callable[[], None] = lambda: None
    is_overdue: Callable[[float], bool] = lambda _: False
    fault: Callable[[], Fault | None] = lambda: None
    timeout_s: float = math.inf


def wait_for_all(refs: Mapping[int, ray.ObjectRef], stream: Any = None, heed: WaitOptions = WaitOptions()) -> Outcome:
    """Wait until every rank has ended, or a grace after the first that failed, a fault, or `timeout_s`.

    `on_event` gets each event of `stream`; `wants_cancel` is polled, and so is an exception from `on_event`
    (ComfyUI interrupts in its progress hook) a wish to cancel: it is for the caller to raise again, once all ranks have
    stopped. What `cancel` raises passes at once.
    """
    outcome, pending = Outcome(), {ref: rank for rank, ref in refs.items()}
    cancelled_at, deadline = None, time.monotonic() + heed.timeout_s
    while pending or stream is not None:
        waiting = [*pending, *([] if stream is None else [stream])]
        ready, _ = ray.wait(waiting, num_returns=1, timeout=POLL_S)
        for item in ready:
            if item is stream:
                stream = _next_event(stream, outcome, heed.on_event)
                continue
            rank = pending.pop(item)
            try:
                outcome.results[rank] = ray.get(item)
            except RayError as error:
                outcome.failures[rank] = error
                grace = REFUSAL_GRACE_S if isinstance(cause_of(error), ValueError) else GRACE_S
                deadline = min(deadline, time.monotonic() + grace)
        now = time.monotonic()
        if cancelled_at is None and (outcome.interruption is not None or heed.wants_cancel()):
            cancelled_at = now
            heed.cancel()
        outcome.fault = heed.fault()
        outcome.overdue = cancelled_at is not None and heed.is_overdue(now - cancelled_at)
        if outcome.fault is not None or outcome.overdue:
            break
        if now > deadline:
            if not outcome.failures:
                outcome.fault = Fault(HUNG, min(pending.values()), f"it has not ended within {heed.timeout_s:g} s")
            break
    outcome.unfinished = set(pending.values())
    if any(isinstance(error, (RayActorError, OutOfMemoryError)) for error in outcome.failures.values()):
        # Of why a process is gone the watchdog knows more, a moment later.
        verdict = time.monotonic() + VERDICT_S
        while outcome.fault is None and time.monotonic() < verdict:
            time.sleep(POLL_S)
            outcome.fault = heed.fault()
    return outcome


def met_alike(outcome: Outcome, world_size: int) -> BaseException | None:
    """What every rank raised, if it is one and the same but for numbers (of tokens, ranks, GPUs): an error that is
    neither of memory nor of a peer that is gone. None otherwise."""
    causes = [cause_of(error) for error in outcome.failures.values()]
    if len(causes) < world_size or len({(type(cause), _NUMBER.sub("#", str(cause))) for cause in causes}) > 1:
        return None
    first = cause_of(outcome.failures[min(outcome.failures)])
    if isinstance(first, RayError) or is_out_of_memory(first) or is_of_peers(first):
        return None
    return first


def results_or_raise(
    outcome: Outcome, world_size: int, scene: WorkerStates, stay: bool | None = None
) -> dict[int, Any]:
    """The results by rank. Raises what the listener raised, RunCancelled, StoreFull, or WorkerError; or an error that
    all ranks have met alike, if the workers `stay` after it (where that is not said, a ValueError)."""
    if outcome.overdue or (outcome.interruption is not None and not outcome.failures and outcome.fault is None):
        raise outcome.interruption or RunCancelled
    cause = met_alike(outcome, world_size)
    if cause is not None and (isinstance(cause, ValueError) if stay is None else stay):
        if not isinstance(cause, ValueError):
            raise cause from outcome.failures[min(outcome.failures)]  # which tells the log where it was in the worker
        # Of the same kind where that is made as a ValueError is, so that callers can tell refusals apart.
        raise (type(cause) if type(cause).__init__ is ValueError.__init__ else ValueError)(str(cause))
    if outcome.fault is not None:
        raise to_error(outcome.fault, scene)
    if outcome.failures:
        for error in outcome.failures.values():
            if is_store_full(error):
                raise store_full("what a worker returns", error) from error
        fault = root_cause(outcome.failures)
        raise to_error(fault, scene) from outcome.failures[fault.rank]
    if any(isinstance(result, Cancelled) for result in outcome.results.values()):
        raise RunCancelled
    return outcome.results


def _next_event(stream: Any, outcome: Outcome, on_event: Callable[[Any], None]) -> Any:
    """Take the next event; returns the stream, or None when it has ended."""
    try:
        event = ray.get(next(stream))
    except (StopIteration, RayError):
        return None  # a failure is told by the run itself
    if outcome.interruption is None:
        try:
            on_event(event)
        except BaseException as error:  # the workers must stop before it may pass
            outcome.interruption = error
    return stream
