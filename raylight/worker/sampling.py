"""A whole run of ComfyUI's sampling, done in a worker."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP
from torch import Tensor

from raylight.cluster.actor import Run
from raylight.host import patcher_state
from raylight.host.jobs import KEY, RunJob, RunResult, StepDone, random_state, set_random_state
from raylight.host.log_messages import warn_on_first_rank
from raylight.host.patcher_state import changed
from raylight.host.pickling import deserialize

from . import lora
from .node_code import leaving_nothing

logger = logging.getLogger(__name__)


class SamplingRun:
    """The job at `place` among several, ready to be done with `patcher` on this rank."""

    def __init__(self, run: Run, patcher: ModelPatcher, place: int, job: RunJob, device: torch.device) -> None:
        self._run = run
        self._place = place
        self._job = job
        self._device = device
        self._last: tuple[int, int, Any, Any] | None = None
        self._steps = 0
        worn, self._changes, self._guider, self._call, self._positional, self._wrappers = deserialize(
            job.content, patcher
        )
        patcher_state.apply_state(patcher, worn, job.model.recipe.sharding)
        warn_on_first_rank(logger, lora.fit_scheduled(patcher), job.model.recipe.name)
        for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.PREPARE_SAMPLING):  # those of ComfyUI's process
            for holder in ("transformer_options", "to_load_options"):
                self.model_options.get(holder, {}).get("wrappers", {}).get(kind, {}).pop(KEY, None)

    @property
    def model_options(self) -> dict[str, Any]:
        """The options with which the model is sampled."""
        return self._guider.model_options

    def sample(self) -> RunResult:
        """The result, the same on every rank of the sequence.

        To be called in the mode of the model. Raises RunCancelled at the first step boundary after a cancel.
        """
        call = self._call | {"callback": self._after_step, "disable_pbar": True}
        mask = call.get("denoise_mask")
        if isinstance(mask, Tensor):  # the one tensor that `outer_sample` takes for being where the model is
            call["denoise_mask"] = mask.to(self._device)
        self._steps = len(call["sigmas"]) - 1
        self._run.enter("bringing the model to its device")
        patcher = self._guider.model_patcher
        patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, lambda _: self._enter_step(1))
        # Wrappers look for arguments at the places where ComfyUI puts them.
        positional = [call.pop(name) for name in list(call)[: self._positional]]
        set_random_state(self._job.random)
        executor = WrapperExecutor.new_class_executor(self._guider.outer_sample, self._guider, self._wrappers)
        try:
            with self._clean(), changed(patcher, self._changes):
                samples = executor.execute(*positional, **call)
        finally:
            # Else the patcher and this run would hold each other, with all that the run has.
            patcher.remove_callbacks_with_key(CallbacksMP.ON_PRE_RUN, KEY)
        return RunResult(samples.cpu(), random_state(self._device), self._last_step())

    def _clean(self) -> AbstractContextManager[None]:
        return leaving_nothing(self._guider.model_patcher) if self._job.model.inside.whole else nullcontext()

    def _enter_step(self, number: int) -> None:
        self._run.enter(f"step {number} of {self._steps}" if number <= self._steps else "ending the last step")

    def _last_step(self) -> StepDone | None:
        if self._last is None or not self._job.wants_last:
            return None
        step, total, x0, x = self._last
        return StepDone(step, total, _on_cpu(x0), _on_cpu(x))

    def _after_step(self, step: int, x0: Any, x: Any, total: int) -> None:
        job = self._job
        if job.every_step or (job.wants_last and step + 1 == total):
            event, self._last = StepDone(step, total, _on_cpu(x0), _on_cpu(x)), None
        else:
            event = StepDone(step, total, _for_preview(x0) if job.wants_preview else None, None)
            # The last of a run whose steps are not known before; copied then, and kept as ComfyUI's callback does.
            self._last = (step, total, x0, x)
        if self._run.rank == 0:
            self._run.emit((self._place, event))
        self._enter_step(step + 2)
        self._run.check_cancelled()


def _on_cpu(value: Any) -> Any:
    """A copy on the CPU, of packed latents of several kinds too."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value.cpu()


def _for_preview(x0: Tensor) -> Tensor:
    """(1, C, 1, H, W) or (1, C, H, W), float32 on the CPU."""
    first = x0[:1, :, :1] if x0.ndim == 5 else x0[:1]
    return first.detach().to("cpu", torch.float32, copy=True)
