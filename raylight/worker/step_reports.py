"""What a worker reports of the steps of a run, sent when its GPU has done them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from raylight.cluster.run import Run


class StepReports:
    """Emits events of a run when the GPU has done the step that they are about, without holding up the host, which
    launches the next step meanwhile.

    A context: its end waits for the last event, but not if it ends by an error or a cancel, which leaves events out.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._thread: ThreadPoolExecutor | None = None

    def emit(self, event: Any, done: torch.cuda.Event | None) -> None:
        """Emit an event after those before it, when the GPU has reached `done`; at once if that is None."""
        if done is None:
            self._run.emit(event)
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "raylight-steps")
        self._thread.submit(self._emit_after, done, event)

    def _emit_after(self, done: torch.cuda.Event, event: Any) -> None:
        done.synchronize()  # without Python's lock; if CUDA is broken, the run meets that error by itself
        self._run.emit(event)

    def __enter__(self) -> StepReports:
        return self

    def __exit__(self, error: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=error is None, cancel_futures=error is not None)


def for_preview(x0: Tensor, whole: bool = False) -> Tensor:
    """Return the first frame of the first image of (B, C, [T,] H, W): (1, C, [1,] H, W) float32 on the CPU; all of x0
    if `whole`. From a GPU it is there when the GPU has done what was launched until now.
    """
    first = x0[:1, :, :1] if x0.ndim == 5 else x0[:1]
    shown = (x0 if whole else first).detach().float()
    copied = torch.empty(shown.shape, pin_memory=shown.is_cuda)  # into other memory a copy would be waited for
    return copied.copy_(shown, non_blocking=True)
