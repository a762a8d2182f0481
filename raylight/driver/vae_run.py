"""One decode or encode of a VAE on the workers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from raylight.cluster.errors import OUT_OF_MEMORY, WorkerError
from raylight.cluster.serialization import pack, unpack
from raylight.host.jobs import random_state, set_random_state
from raylight.host.recipe import WorkerConfig
from raylight.host.shared_picture import new_picture
from raylight.host.vae_jobs import VaeJob, VaeProgress, VaeRecipe, VaeResult
from raylight.host.worker_service import WorkerService

from . import progress
from .workers import ask_with_room, open_session

logger = logging.getLogger(__name__)

_PIECES_AFTER_FAILURE = 4  # of the width, when workers ran out of memory with fewer
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class VaeRun:
    """A VAE on workers: ComfyUI's own, `comfy.sd.VAE`, in its process, and how workers get it."""

    vae: Any
    workers: WorkerConfig
    recipe: VaeRecipe

    def decode(self, latent: Tensor, options: Mapping[str, Any]) -> Tensor:
        """Return the picture of a latent, (B, C, [T,] H, W), channels first and on the CPU.

        Raises what `workers.ask_all` raises.
        """
        return self._run(WorkerService.vae_decode, latent, options, to_file=True)

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the latent of pictures, (B, [T,] H, W, C), on the CPU. Raises what `workers.ask_all` raises."""
        return self._run(WorkerService.vae_encode, pixels, {}, to_file=False)

    def _run(self, verb: Callable[..., Any], value: Tensor, options: Mapping[str, Any], to_file: bool) -> Tensor:
        job = VaeJob(
            self.recipe,
            pack((value, dict(options)), lambda _: None),
            random_state(self.vae.device),
            free_memory_after=self.workers.free_memory_after,
        )
        try:
            return self._once(verb, job, to_file)
        except WorkerError as error:
            if error.kind != OUT_OF_MEMORY:
                raise
            logger.warning(
                "a worker ran out of memory with whole rows; new workers try again, image by image and with up to %d "
                "pieces of the width that are blended as ComfyUI's tiles are: %s",
                _PIECES_AFTER_FAILURE,
                error,
            )
        return self._once(verb, replace(job, least_pieces=_PIECES_AFTER_FAILURE), to_file)

    def _once(self, verb: Callable[..., Any], job: VaeJob, to_file: bool) -> Tensor:
        session = open_session(self.workers)
        file = new_picture(session.config.is_local) if to_file else None
        bar = _Bar()
        began = time.monotonic()
        try:
            job = job if file is None else replace(job, picture=file.path)
            answers: dict[int, VaeResult] = ask_with_room(session, verb, job, self.recipe, bar.show)
            first = answers[0]
            dtype = getattr(torch, first.dtype)
            result = _joined(answers) if file is None else file.picture(first.shape, dtype)
        finally:
            if file is not None:
                file.close()
        set_random_state(first.random)
        how = "rows" if first.pieces == 1 else f"rows in {first.pieces} pieces of the width"
        text = f"{self.recipe.name}: {how} on {len(answers)} workers in {time.monotonic() - began:.2f} s"
        logger.info("%s", text)
        progress.show_text(text)
        return result


def _joined(answers: Mapping[int, VaeResult]) -> Tensor:
    """Return the rows of all ranks as one tensor."""
    rows = [answers[rank].rows for rank in sorted(answers)]
    return torch.cat([unpack(one, lambda value: value, _CPU, copies=False) for one in rows if one is not None], dim=-2)


class _Bar:
    """The progress of several images on the executing node."""

    def __init__(self) -> None:
        self._bar: comfy.utils.ProgressBar | None = None

    def show(self, done: VaeProgress) -> None:
        """Show how many images are done, if there are several."""
        if done.total > 1:
            self._bar = self._bar or comfy.utils.ProgressBar(done.total)
            self._bar.update_absolute(done.done, done.total)
