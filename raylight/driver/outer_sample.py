"""A whole run of a sampler, done by the workers.

ComfyUI's own guider and sampler run there as they would here: nothing of either is written again.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.utils
from comfy.cli_args import LatentPreviewMethod, args
from torch import Tensor
from tqdm.auto import tqdm

from raylight.cluster import active_session
from raylight.cluster.session import Session
from raylight.host import patcher_state
from raylight.host.foreign_code import node_name_of, replaced_in_loop
from raylight.host.jobs import RunJob, RunResult, StepDone, random_state, set_random_state
from raylight.host.patcher_state import Change
from raylight.host.pickling import NotSerializableError, serialize
from raylight.host.worker_service import WorkerService

from . import injected_code, model_changes, written_weights
from . import workers as at_workers
from .batched_runs import PendingRun, join_batch
from .model_job import model_job
from .remote_model import RemotePatcher

_waiting = False


class MoveToWorkers(BaseException):
    """Ends a run in this process, which the workers are to do as a whole. No error, so no handler of errors may stop
    it. `whole` is as in `Inside`."""

    def __init__(self, whole: str) -> None:
        self.whole = whole


@contextmanager
def moving_at_first_forward() -> Iterator[None]:
    """Within it the run may go over. Raises MoveToWorkers."""
    global _waiting
    _waiting = True
    try:
        yield
    finally:
        _waiting = False


def move_to_workers(whole: str) -> None:
    """Raise MoveToWorkers where this run may move to the workers and, by its first forward, has to.

    To be called before each forward that is sent.
    """
    global _waiting
    if _waiting and whole:
        raise MoveToWorkers(whole)
    _waiting = False


logger = logging.getLogger(__name__)


def run_on_workers(executor: Any, *arguments: Any, **named: Any) -> Tensor:
    """An OUTER_SAMPLE wrapper of ComfyUI: does on the workers what it wraps, where all of it can travel.

    Otherwise the loop goes on in this process, and the model's forwards are sent to the workers one by one. Raises what
    `workers.ask` raises.
    """
    guider = executor.class_obj
    patcher = guider.model_patcher
    if not isinstance(patcher, RemotePatcher):
        return executor(*arguments, **named)
    call = inspect.signature(executor.original).bind(*arguments, **named).arguments
    callback, call["callback"] = call.get("callback"), None
    inner = executor.wrappers[executor.idx + 1 :]
    injected_code.begin()
    random = random_state(patcher.load_device)
    whole = ""
    try:
        changes = _changes(patcher)
        written_weights.look(patcher.model, patcher.recipe)
    except NotSerializableError as reason:
        return _stay(reason, patcher, executor, arguments, named)
    parts = (patcher_state.of_run(patcher), changes, guider, call, len(arguments), inner)
    try:
        content = serialize(parts, patcher, foreign_code=False)
    except NotSerializableError as reason:
        try:
            content = serialize(parts, patcher, foreign_code=True, networks=False)  # as it is before the run
        except NotSerializableError:
            return _stay(reason, patcher, executor, arguments, named)
        whole = injected_code.inside_of(patcher, changes).whole
        if not whole:
            try:
                with moving_at_first_forward():
                    return _stay(reason, patcher, executor, arguments, named)
            except MoveToWorkers as gone:
                whole = gone.whole
    session = at_workers.session(patcher.workers)
    # Of ComfyUI's own callback it is known what it looks at.
    every_step = callback is not None and getattr(callback, "__module__", None) != "latent_preview"
    job = RunJob(
        model_job(session, patcher, changes, whole),
        content,
        tuple(call["noise"].shape),
        random,
        patcher.workers.free_memory_after,
        wants_preview=callback is not None and args.preview_method != LatentPreviewMethod.NoPreviews,
        every_step=every_step,
        wants_last=callback is not None and not every_step,
    )
    shows_bar = comfy.utils.PROGRESS_BAR_ENABLED and not call.get("disable_pbar")
    pending = PendingRun(job, ProgressReporter(callback, shows_bar), functools.partial(_concluded, callback))
    result = join_batch(pending)
    if result is not None:
        return result
    logger.info("the workers do the whole run%s", ", with the code of node packs" if whole else "")
    try:
        result = _finished(session, [pending])[0]
    except NotSerializableError as reason:
        return _stay(reason, patcher, executor, arguments, named)
    return pending.conclude(result)


def _changes(patcher: RemotePatcher) -> list[Change]:
    """Return the changes on the model itself. Raises NotSerializableError where the sampling loop was changed."""
    in_loop = replaced_in_loop()
    if in_loop:
        first = in_loop[0]
        raise NotSerializableError(
            f"code of another node pack takes the place of {first.place} ({node_name_of(first.value)})"
        )
    return model_changes.of_run(patcher)


def _stay(
    reason: NotSerializableError,
    patcher: RemotePatcher,
    executor: Any,
    arguments: tuple[Any, ...],
    named: dict[str, Any],
) -> Tensor:
    """Do the run here, and leave nothing of it on the model, which the next run may not load."""
    logger.info("the sampling loop stays in ComfyUI, and each forward goes to the workers: %s", reason)
    try:
        return executor(*arguments, **named)
    finally:
        patcher.unpatch_model(unpatch_weights=False)


def finish(pending: Sequence[PendingRun]) -> list[RunResult]:
    """Have the workers do several runs at once. Raises what `workers.ask_all` raises."""
    running = active_session.running()
    if running is None:
        raise RuntimeError("the workers have ended: run the prompt again")
    logger.info("the workers do %d runs at once", len(pending))
    return _finished(running, pending)


def _finished(session: Session, pending: Sequence[PendingRun]) -> list[RunResult]:
    def on_event(event: tuple[int, StepDone]) -> None:
        pending[event[0]].tell(event[1])

    try:
        answers = at_workers.ask_with_room(
            session, WorkerService.sample, tuple(one.job for one in pending), pending[0].job.model.recipe, on_event
        )
    finally:
        for one in pending:
            one.tell.close()
    by_place = {place: result for of_rank in answers.values() for place, result in of_rank.items()}
    return [by_place[place] for place in range(len(pending))]


def _concluded(callback: Callable[..., Any] | None, result: RunResult) -> Tensor:
    """The latent of a run; what it leaves behind is as if it had been done here."""
    if callback is not None and result.last is not None:
        _tell(callback, result.last)
    set_random_state(result.random)
    return result.samples


class ProgressReporter:
    """Tells ComfyUI's callback, and the terminal, of each step."""

    def __init__(self, callback: Callable[..., Any] | None, shows_bar: bool) -> None:
        self._callback = callback
        self._shows_bar = shows_bar
        self._bar: tqdm | None = None

    def __call__(self, event: StepDone) -> None:
        if self._bar is None:
            self._bar = tqdm(total=event.total, disable=not self._shows_bar)
        self._bar.update(event.step + 1 - self._bar.n)
        if self._callback is not None:
            _tell(self._callback, event)

    def close(self) -> None:
        """No more steps will be told."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _tell(callback: Callable[..., Any], event: StepDone) -> None:
    callback(event.step, event.x0, event.x, event.total)
