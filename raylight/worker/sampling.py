"""A complete run of ComfyUI's sampling in a worker."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP, add_wrapper_with_key
from torch import Tensor

from raylight.cluster.run import Run
from raylight.host import patcher_state
from raylight.host.jobs import KEY, RunJob, RunResult, StepDone, random_state, set_random_state
from raylight.host.log_messages import warn_on_first_rank
from raylight.host.patcher_state import Change, changed
from raylight.host.pickling import deserialize

from . import lora
from .node_code import restored_after
from .pace import Pace
from .resident_conds import ResidentConds
from .step_reports import StepReports, for_preview

logger = logging.getLogger(__name__)


class SamplingRun:
    """Job number `index` of several, deserialized for `patcher` on this rank. At the end of each step ranks `agree` on
    the smallest value, and whether the run is cancelled.
    """

    def __init__(
        self,
        run: Run,
        patcher: ModelPatcher,
        index: int,
        job: RunJob,
        device: torch.device,
        agree: Callable[[int], int],
    ) -> None:
        self._run, self._agree = run, agree
        self._index = index
        self._job = job
        self._device = device
        self._last: tuple[int, int, Any, Any] | None = None
        self._steps = 0
        self._on_step: Callable[[], None] = lambda: None
        self._pace = Pace(device)
        self._reports = StepReports(run)
        state, self._changes, self._guider, self._call, self._positional, self._wrappers = deserialize(
            job.content, patcher
        )
        patcher_state.apply_state(patcher, state, job.model.recipe.sharding)
        warn_on_first_rank(logger, lora.fit_scheduled(patcher), job.model.recipe.name)
        for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.PREPARE_SAMPLING):  # for ComfyUI's process only
            for holder in ("transformer_options", "to_load_options"):
                self.model_options.get(holder, {}).get("wrappers", {}).get(kind, {}).pop(KEY, None)
        # Those of nodes, of the model's too, are there already, so this is within them.
        conds = ResidentConds(device)
        add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, conds, self.model_options, is_model_options=True)

    @property
    def model_options(self) -> dict[str, Any]:
        """The model options of the run, which may still be changed."""
        return self._guider.model_options

    @property
    def changes(self) -> Sequence[Change]:
        """What nodes have changed on the model itself."""
        return self._changes

    def sample(self, on_step: Callable[[], None] = lambda: None) -> RunResult:
        """Sample, and return the result, the same on every rank of the sequence group. `on_step` is called after each
        step, and at the end.

        To be called in the mode of the model. Raises RunCancelled: at the first step boundary after a cancel.
        """
        self._on_step = on_step
        call = self._call | {"callback": self._after_step, "disable_pbar": True}
        mask = call.get("denoise_mask")
        if isinstance(mask, Tensor):  # the one tensor that `outer_sample` expects on the model's device
            call["denoise_mask"] = mask.to(self._device)
        self._steps = len(call["sigmas"]) - 1
        self._run.enter("bringing the model to its device")
        patcher = self._guider.model_patcher
        patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, lambda _: self._enter_step(1))
        # Wrappers look for arguments at the positions that ComfyUI gives them.
        positional = [call.pop(name) for name in list(call)[: self._positional]]
        set_random_state(self._job.random)
        executor = WrapperExecutor.new_class_executor(self._guider.outer_sample, self._guider, self._wrappers)
        clean = restored_after(patcher) if self._job.model.inside.full_tokens_for else nullcontext()
        try:
            with clean, changed(patcher, self._changes), self._reports:
                samples = executor.execute(*positional, **call)
        finally:
            # Otherwise the patcher and this run would keep each other alive, with all that the run has.
            patcher.remove_callbacks_with_key(CallbacksMP.ON_PRE_RUN, KEY)
            patcher.agreed_free = None
        on_step()
        return RunResult(samples.cpu(), random_state(self._device), self._last_step())

    def _enter_step(self, number: int) -> None:
        self._run.enter(f"step {number} of {self._steps}" if number <= self._steps else "ending the last step")

    def _last_step(self) -> StepDone | None:
        if self._last is None or not self._job.wants_last:
            return None
        step, total, x0, x = self._last
        return StepDone(step, total, _on_cpu(x0), _on_cpu(x))

    def _after_step(self, step: int, x0: Any, x: Any, total: int) -> None:
        job, reports = self._job, self._run.rank == 0
        if job.every_step or (job.wants_last and step + 1 == total):
            event, self._last = StepDone(step, total, _on_cpu(x0), _on_cpu(x)), None
        else:
            shown = for_preview(x0, job.whole_preview) if job.wants_preview and reports else None
            event = StepDone(step, total, shown, None)
            # How many steps there are may not be known before: keep each as the possible last one, copied at the end.
            self._last = (step, total, x0, x)
        done = self._pace.launched()
        self._on_step()
        if reports:
            self._reports.emit((self._index, event), done)
        self._enter_step(step + 2)
        patcher = self._guider.model_patcher
        # ComfyUI asks for it in the next step. The GPU may be waiting for that, and ranks for each other.
        patcher.agreed_free = self._agree(patcher.own_free_memory(self._device))


def _on_cpu(value: Any) -> Any:
    """Return a copy on the CPU, also of packed latents of several kinds."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value.cpu()
