"""Several runs in one request, so that each group of workers does some of them.

A sampling node waits for its result before the next one begins. So each run has a thread of its own, which stops where
the run is ready for the workers; when all have come so far, one request does them together, and each thread goes on
with its result. Only one thread runs at a time, in the order of the runs, as they would without threads.
"""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

from raylight.host.jobs import RunResult, set_random_state
from raylight.host.pickling import NotSerializableError

from .pending_run import PendingRun, complete

logger = logging.getLogger(__name__)

T = TypeVar("T")
_UNWIND_S = 30.0


class _BatchEnded(BaseException):
    """Unwinds a waiting run after another one has failed. Not an Exception, so that no handler of errors stops it."""


class _RunThread(threading.Thread, Generic[T]):
    """One run in a thread of its own, which runs only while `advance` waits for it. `returned` is set at its end."""

    returned: T

    def __init__(self, run: Callable[[], T]) -> None:
        super().__init__(name="raylight-run", daemon=True)
        self.pending: PendingRun | None = None
        self._run_once = run
        self._raised: BaseException | None = None
        self._result: RunResult | None = None
        self._batch_ended = False
        self._may_go_on, self._has_stopped = threading.Semaphore(0), threading.Semaphore(0)
        # A new thread has PyTorch's defaults, and does not know which node ComfyUI is running.
        self._node_context = contextvars.copy_context()  # Thread has a `_context` of its own from Python 3.14 on
        self._inference, self._grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1

    def advance(self, result: RunResult | None = None) -> None:
        """Let the run start, or go on with its result, until it waits or ends. Raises what the run raises."""
        self._result = result
        if self.ident is None:
            self.start()
        else:
            self._may_go_on.release()
        self._has_stopped.acquire()
        if self._raised is not None:
            error, self._raised = self._raised, None
            raise error

    def wait_for_result(self, pending: PendingRun) -> RunResult | None:
        """Stop until `advance` brings the result. Called in this thread; at once None for any but the first sampling of
        the run.
        """
        if self.pending is not None:
            return None
        self.pending = pending
        self._has_stopped.release()
        self._may_go_on.acquire()
        if self._batch_ended:
            raise _BatchEnded
        set_random_state(pending.job.random)  # other runs have drawn since
        return self._result

    def unwind(self) -> None:
        """End the run if it still waits."""
        if self.is_alive():
            self._batch_ended = True
            self._may_go_on.release()
            self.join(_UNWIND_S)
            if self.is_alive():
                logger.warning("a run of a batch that failed has not ended within %.0f s", _UNWIND_S)

    def run(self) -> None:
        self._node_context.run(self._work)

    def _work(self) -> None:
        try:
            with (
                torch.inference_mode(self._inference),
                torch.set_grad_enabled(self._grad),
                torch.cuda.device(self._device),
            ):
                self.returned = self._run_once()
        except BaseException as error:
            self._raised = error
        finally:
            self._has_stopped.release()


def run_batched(runs: Sequence[Callable[[], T]]) -> list[T]:
    """Call each of `runs` once and return their results in order; what they send to the workers goes in one request.

    Groups of workers, if there are several, do them at the same time. Each run needs a patcher of its own; one that
    sends nothing just ends. Raises what the first run that fails raises, or the request does; the other
    runs are unwound then.
    """
    if len(runs) == 1:
        return [runs[0]()]
    threads = [_RunThread(run) for run in runs]
    try:
        for thread in threads:
            thread.advance()
        waiting = {thread: thread.pending for thread in threads if thread.pending is not None}
        for thread, result in zip(waiting, _results([*waiting.values()]), strict=True):
            thread.advance(result)
        return [thread.returned for thread in threads]
    finally:
        for thread in threads:
            thread.unwind()


def _results(pending: Sequence[PendingRun]) -> Sequence[RunResult | None]:
    """Return None for each where they cannot be done together; each run goes on by itself then."""
    kinds = [(one.session, one.job.model) for one in pending]
    if kinds and all(kind == kinds[0] for kind in kinds):
        try:
            return complete(pending)
        except NotSerializableError:
            pass
    return [None] * len(pending)


def join_batch(pending: PendingRun) -> RunResult | None:
    """Wait for the batch that the calling run is in, and return the run's result; None where it is to be done by
    itself.
    """
    thread = threading.current_thread()
    return thread.wait_for_result(pending) if isinstance(thread, _RunThread) else None
