"""A whole run of a sampler, handed over to the workers.

ComfyUI's own guider and sampler do it there as they would here: nothing of either is written again.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import comfy.utils
import torch
from comfy.cli_args import LatentPreviewMethod, args
from torch import Tensor
from tqdm.auto import tqdm

from . import dress
from . import workers as at_workers
from .job import RandomState, RunJob, RunResult, StepDone
from .model_job import model_job
from .remote_patcher import RemotePatcher
from .travel import CannotTravel, send

logger = logging.getLogger(__name__)


def hand_over(executor: Any, *arguments: Any, **named: Any) -> Tensor:
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
    inner = executor.wrappers[executor.idx + 1:]
    try:
        content = send((dress.of_run(patcher), guider, call, len(arguments), inner), patcher, foreign_code=False)
    except CannotTravel as reason:
        logger.info("the sampling loop stays in ComfyUI, and each forward goes to the workers: %s", reason)
        return executor(*arguments, **named)
    logger.info("the workers do the whole run")
    session = at_workers.session(patcher.workers, patcher.recipe, call["noise"].shape)
    # Of ComfyUI's own callback it is known what it looks at.
    every_step = callback is not None and getattr(callback, "__module__", None) != "latent_preview"
    job = RunJob(
        model_job(session, patcher), content, random_state(patcher.load_device), patcher.workers.free_memory_after,
        wants_preview=callback is not None and args.preview_method != LatentPreviewMethod.NoPreviews,
        every_step=every_step,
    )
    with tqdm(disable=call.get("disable_pbar") or not comfy.utils.PROGRESS_BAR_ENABLED) as bar:
        result: RunResult = at_workers.ask(session, "sample", job, on_event=_teller(bar, callback))
    if callback is not None and result.last is not None:
        _tell(callback, result.last)
    set_random_state(result.random)
    return result.samples


def random_state(device: torch.device) -> RandomState:
    """The state of this process's global generators."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return RandomState(torch.get_rng_state(), cuda)


def set_random_state(state: RandomState) -> None:
    """Have this process's global generators go on from a state."""
    torch.set_rng_state(state.cpu.clone())
    if state.cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state.cuda.clone())


def _teller(bar: tqdm, callback: Callable[..., Any] | None) -> Callable[[StepDone], None]:
    def on_event(event: StepDone) -> None:
        bar.total = event.total
        bar.update(event.step + 1 - bar.n)
        if callback is not None:
            _tell(callback, event)

    return on_event


def _tell(callback: Callable[..., Any], event: StepDone) -> None:
    callback(event.step, event.x0, event.x, event.total)
