"""Waiting for all ranks of a run at once: events, cancel, and the first failure."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from .actor import Cancelled, Place
from .errors import RunCancelled, WorkerError

logger = logging.getLogger(__name__)

POLL_S = 0.1
# How long the other ranks get to end after the first failure. A ValueError is most likely a refusal, to which
# every rank comes in its own time; after anything else they may be stuck in a collective for good.
GRACE_S = 5.0
REFUSAL_GRACE_S = 60.0


@dataclass(slots=True)
class Outcome:
    """How each rank ended, in the order in which they did."""

    results: dict[int, Any] = field(default_factory=dict)
    failures: dict[int, BaseException] = field(default_factory=dict)
    unfinished: set[int] = field(default_factory=set)


def wait_for_all(refs: dict[int, ray.ObjectRef], stream: Any, on_event: Callable[[Any], None],
                 wants_cancel: Callable[[], bool], cancel: Callable[[], None]) -> Outcome:
    """Wait until every rank has ended, or until a grace after the first that failed.

    `on_event` gets each event of `stream`; `wants_cancel` is polled, and so is an exception from `on_event`
    (ComfyUI interrupts in its progress hook) a wish to cancel: it is raised again once all ranks have stopped.
    """
    outcome, pending = Outcome(), {ref: rank for rank, ref in refs.items()}
    cancelled, interruption, deadline = False, None, None
    while pending or stream is not None:
        waiting = [*pending, *([] if stream is None else [stream])]
        ready, _ = ray.wait(waiting, num_returns=1, timeout=POLL_S)
        for item in ready:
            if item is stream:
                try:
                    event = ray.get(next(stream))
                except (StopIteration, RayError):
                    stream = None  # a failure is told by the run itself
                    continue
                if interruption is None:
                    try:
                        on_event(event)
                    except BaseException as error:  # the workers must stop before it may pass
                        interruption = error
                continue
            rank = pending.pop(item)
            try:
                outcome.results[rank] = ray.get(item)
            except RayError as error:
                outcome.failures[rank] = error
                grace = REFUSAL_GRACE_S if isinstance(_cause(error), ValueError) else GRACE_S
                deadline = min(deadline or math.inf, time.monotonic() + grace)
        if not cancelled and (interruption is not None or wants_cancel()):
            cancelled = True
            cancel()
        if deadline is not None and time.monotonic() > deadline:
            break
    outcome.unfinished = set(pending.values())
    if interruption is not None and not outcome.failures:
        raise interruption
    return outcome


def is_refusal(outcome: Outcome, places: dict[int, Place]) -> bool:
    """Whether every rank raised the same ValueError: that is about the input, and the workers are as they were."""
    causes = [_cause(error) for error in outcome.failures.values()]
    return (
        len(causes) == len(places) and all(isinstance(cause, ValueError) for cause in causes)
        and len({str(cause) for cause in causes}) == 1
    )


def conclude(outcome: Outcome, places: dict[int, Place]) -> dict[int, Any]:
    """The results by rank. Raises RunCancelled, a ValueError that all ranks agree on, or WorkerError."""
    if outcome.failures:
        # A rank that died is the cause of what its peers then met; otherwise the first to fail is.
        died = [rank for rank, error in outcome.failures.items() if isinstance(error, RayActorError)]
        rank = next(iter(died or outcome.failures))
        error = outcome.failures[rank]
        if is_refusal(outcome, places):
            cause = _cause(error)
            # Of the same kind where that is made as a ValueError is, so that callers can tell refusals apart.
            raise (type(cause) if type(cause).__init__ is ValueError.__init__ else ValueError)(str(cause))
        logger.error("%s failed: %s", places[rank], error)
        what = "died" if died else f"failed: {type(_cause(error)).__name__}"
        raise WorkerError(f"{places[rank]} {what}: {_cause(error)}")
    if any(isinstance(result, Cancelled) for result in outcome.results.values()):
        raise RunCancelled
    return outcome.results


def _cause(error: BaseException) -> BaseException:
    return error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
