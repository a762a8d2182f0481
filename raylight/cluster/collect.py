"""Collect the results of all ranks, with events, cancellation, failures and time limits."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError

from . import diagnosis
from .diagnosis import Failure, Remedies, WorkerStates, cause_of
from .errors import HUNG, RunCancelled, is_out_of_memory
from .run import Cancelled
from .status import STEP, VAE
from .watchdog import Watchdog

POLL_S = 0.1
# Time for the other ranks to end after the first error. A ValueError is most likely a refusal, which every rank reaches
# at its own pace; after another error they may be stuck in a collective.
GRACE_S = 3.0
REFUSAL_GRACE_S = 60.0
CANCEL_GRACE_S = 1.5  # for what is neither a step nor a VAE's work, and after it
WATCHDOG_S = 3.0
_NUMBER = re.compile(r"0x[0-9a-fA-F]+|\d+")


@dataclass(slots=True)
class Outcome:
    """How each rank ended: `results` and `errors` by rank, in the order in which they came.

    `failure` was found by the watchdog. `overdue`: ranks did not end after a cancel. `interruption` was raised by the
    listener to events.
    """

    results: dict[int, Any] = field(default_factory=dict)
    errors: dict[int, BaseException] = field(default_factory=dict)
    unfinished: set[int] = field(default_factory=set)
    failure: Failure | None = None
    overdue: bool = False
    interruption: BaseException | None = None

    @property
    def is_clean(self) -> bool:
        """Whether every rank has ended without an error, so that it can work again."""
        return not (self.errors or self.unfinished or self.failure or self.overdue)


@dataclass(frozen=True, slots=True)
class WaitOptions:
    """Events, cancellation and time limit of a wait. `on_result` gets the number of ranks that have ended well."""

    watchdog: Watchdog
    on_event: Callable[[Any], None] = lambda _: None
    wants_cancel: Callable[[], bool] = lambda: False
    cancel: Callable[[], None] = lambda: None
    timeout_s: float = math.inf
    on_result: Callable[[int], None] = lambda _: None


def wait_for_all(refs: Mapping[int, ray.ObjectRef], options: WaitOptions, stream: Any = None) -> Outcome:
    """Wait until every rank has ended, until a grace time after the first error, a failure, or `timeout_s`.

    `on_event` gets each event of `stream`. The run is cancelled when `wants_cancel()` is true or `on_event` raises
    (ComfyUI interrupts in its progress hook); the caller must raise that error when all ranks have stopped.
    Raises what `options.cancel` raises.
    """
    outcome, pending = Outcome(), {ref: rank for rank, ref in refs.items()}
    cancelled_at, computed_at, deadline = None, -math.inf, time.monotonic() + options.timeout_s
    while pending or stream is not None:
        waiting = [*pending, *([] if stream is None else [stream])]
        ready, _ = ray.wait(waiting, num_returns=1, timeout=POLL_S)
        for item in ready:
            if item is stream:
                stream = _next_event(stream, outcome, options.on_event)
                continue
            rank = pending.pop(item)
            try:
                outcome.results[rank] = ray.get(item)
                options.on_result(len(outcome.results))
            except RayError as error:
                outcome.errors[rank] = error
                grace_s = REFUSAL_GRACE_S if isinstance(cause_of(error), ValueError) else GRACE_S
                deadline = min(deadline, time.monotonic() + grace_s)
        now = time.monotonic()
        if is_computing(options.watchdog.phases.values()):
            computed_at = now
        if cancelled_at is None and (outcome.interruption is not None or options.wants_cancel()):
            cancelled_at = now
            options.cancel()
        outcome.failure = options.watchdog.failure
        # Counted from the end of what may take longer: a rank's new phase can be here before its result.
        outcome.overdue = cancelled_at is not None and now - max(cancelled_at, computed_at) > CANCEL_GRACE_S
        if outcome.failure is not None or outcome.overdue:
            break
        if now > deadline:
            if not outcome.errors:
                outcome.failure = Failure(HUNG, min(pending.values()), f"no answer within {options.timeout_s:g} s")
            break
    outcome.unfinished = set(pending.values())
    patience_s = 0.0
    if any(isinstance(error, (RayActorError, OutOfMemoryError)) for error in outcome.errors.values()):
        patience_s = max(WATCHDOG_S, options.watchdog.patience_s)
    elif any(diagnosis.is_lost_peer(cause_of(error)) for error in outcome.errors.values()):
        patience_s = options.watchdog.patience_s
    if patience_s:
        # The watchdog finds out why a process has ended, or a connection, a moment later.
        until = time.monotonic() + patience_s
        while outcome.failure is None and time.monotonic() < until:
            time.sleep(POLL_S)
            outcome.failure = options.watchdog.failure
    return outcome


def is_computing(phases: Iterable[str]) -> bool:
    """Return whether a rank is in a step, or in a VAE, which may take long to get to where a cancel is looked at."""
    return any(phase.startswith((STEP, *VAE)) for phase in phases)


def common_error(outcome: Outcome) -> BaseException | None:
    """Return rank 0's error if every rank raised the same one, None otherwise.

    Numbers (of tokens, ranks, GPUs) may differ. Errors of memory, of Ray and of a lost peer are never common.
    """
    causes = {rank: cause_of(error) for rank, error in outcome.errors.items()}
    kinds = {(type(cause), _NUMBER.sub("#", str(cause))) for cause in causes.values()}
    if len(kinds) != 1 or outcome.results or outcome.unfinished:
        return None
    first = causes[min(causes)]
    return None if isinstance(first, RayError) or is_out_of_memory(first) or diagnosis.is_lost_peer(first) else first


def results_or_raise(
    outcome: Outcome, states: WorkerStates, remedies: Remedies = diagnosis.no_remedies, stay: bool | None = None
) -> dict[int, Any]:
    """Return the results by rank.

    Raises what the listener raised. Raises RunCancelled: when the run was cancelled. Raises StoreFull: when a result
    found no room. Raises the common error of all ranks: if the workers `stay`; None means that they stay after
    a ValueError only. Raises WorkerError: for any other failure.
    """
    if outcome.overdue or (outcome.interruption is not None and not outcome.errors and outcome.failure is None):
        raise outcome.interruption or RunCancelled
    error = common_error(outcome)
    if error is not None and (isinstance(error, ValueError) if stay is None else stay):
        if not isinstance(error, ValueError):
            raise error from outcome.errors[min(outcome.errors)]  # the worker's traceback, for the log
        # Keep the type of a refusal if it can be made from a message, so that callers can tell refusals apart.
        raise (type(error) if type(error).__init__ is ValueError.__init__ else ValueError)(str(error))
    failure = outcome.failure
    if failure is None and outcome.errors:
        for error in outcome.errors.values():
            if diagnosis.is_store_full(error):
                raise diagnosis.store_full("a worker's result", error) from error
        failure = diagnosis.root_cause(outcome.errors)
    if failure is not None:
        raise diagnosis.to_error(failure, states, remedies) from failure.error
    if any(isinstance(result, Cancelled) for result in outcome.results.values()):
        raise RunCancelled
    return outcome.results


def _next_event(stream: Any, outcome: Outcome, on_event: Callable[[Any], None]) -> Any:
    """Pass on the next event. Return the stream, or None when it has ended."""
    try:
        event = ray.get(next(stream))
    except (StopIteration, RayError):
        return None  # the run itself reports a failure
    if outcome.interruption is None:
        try:
            on_event(event)
        except BaseException as error:  # raised again by the caller, after the workers have stopped
            outcome.interruption = error
    return stream
