"""What a rank does with VAEs: load one, decode and encode with it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from raylight.cluster.run import RankContext, Run
from raylight.cluster.serialization import SerializedObject, pack, unpack
from raylight.host.jobs import NeedsBytes, random_state, set_random_state
from raylight.host.loading import file_errors
from raylight.host.log_messages import gb, warn_on_first_rank
from raylight.host.machine_memory import available_memory
from raylight.host.shared_picture import open_picture, resize_picture
from raylight.host.vae_file import map_vae
from raylight.host.vae_jobs import VaeJob, VaeProgress, VaeRecipe, VaeResult
from raylight.parallel.process_group import any_rank, of_all_ranks, smallest

from . import cuda_graphs, load_progress
from .model_cache import CachedModel, ModelCache
from .patcher import mode_of
from .row_vae import RowVae, slices

logger = logging.getLogger(__name__)

_RESERVE_BYTES = 256 * 2**20  # of system memory stay free beside a picture


class VaeWork:
    """The VAEs of one rank, which are in the cache of its models."""

    def __init__(self, context: RankContext, models: ModelCache, beside_comfyui: bool) -> None:
        """Open it. `beside_comfyui` tells whether ComfyUI uses the same GPU."""
        self._context, self._models, self._beside_comfyui = context, models, beside_comfyui

    def decode(self, run: Run, job: VaeJob, may_refuse: bool) -> VaeResult | NeedsBytes:
        """Decode a latent, as `WorkerService.vae_decode`."""
        with self._loaded(run, job.recipe) as vae:
            if not vae.has_decoder:
                raise ValueError(f"{job.recipe.name} has no decoder: it can encode only. Choose another VAE to decode")
            latent, options = self._content(job)
            latent = vae.latent_to_decode(latent)
            vae.expect(vae.vae.memory_used_decode, tuple(latent.shape))
            if refusal := self._make_room(job, may_refuse):
                return refusal
            width = latent.shape[-1] * vae.vae.spacial_compression_decode()
            batch, pieces = self._pieces(run, job, vae, width)
            set_random_state(job.random)
            run.enter(f"decoding with {job.recipe.name}")
            output = _Output(run, job, vae, latent.shape[0])
            vae.decode(latent, batch, pieces, options, output.add)
            result = output.result(pieces, random_state(self._context.device))
        self._end(job)
        return result

    def encode(self, run: Run, job: VaeJob, may_refuse: bool) -> VaeResult | NeedsBytes:
        """Encode pictures, as `WorkerService.vae_encode`."""
        with self._loaded(run, job.recipe) as vae:
            if not vae.has_encoder:
                raise ValueError(f"{job.recipe.name} has no encoder: it can decode only. Choose another VAE to encode")
            pixels, _ = self._content(job)
            pixels = vae.pixels_to_encode(pixels)
            vae.expect(vae.vae.memory_used_encode, tuple(pixels.shape))
            if refusal := self._make_room(job, may_refuse):
                return refusal
            batch, pieces = self._pieces(run, job, vae, pixels.shape[-1])
            set_random_state(job.random)
            run.enter(f"encoding with {job.recipe.name}")
            rows = vae.encode(pixels, batch, pieces)
            shape = (*rows.shape[:-2], sum(of_all_ranks(rows.shape[-2])), rows.shape[-1])
            result = VaeResult(shape, _name(rows.dtype), pieces, random_state(self._context.device), _packed(rows))
        self._end(job)
        return result

    @contextmanager
    def _loaded(self, run: Run, recipe: VaeRecipe) -> Iterator[RowVae]:
        """Load a VAE, unless it is there; within the context its weights may be used."""
        with mode_of(recipe.sharding), load_progress.for_run(run, recipe):
            model = self._models.get(recipe)
            if model is None:
                run.enter(f"loading {recipe.name}")
                vae = RowVae(map_vae(recipe))
                with file_errors(recipe):  # what needs another dtype is read here on the CPU
                    patcher, own_bytes = vae.build_patcher()
                parallel: Any = vae
                model = CachedModel(recipe, patcher, parallel, {}, {}, own_bytes)
                self._models.add(model)
                logger.info(
                    "%s is loaded (%s, %s)", recipe.name, type(vae.vae.first_stage_model).__name__, vae.vae.vae_dtype
                )
            found: Any = model.parallel
            yield found

    def _content(self, job: VaeJob) -> tuple[Tensor, dict[str, Any]]:
        return unpack(job.content, _no_reference, self._context.device, copies=False)

    def _make_room(self, job: VaeJob, may_refuse: bool) -> NeedsBytes | None:
        shapes = [()]  # one result, of which the model knows what it takes
        if may_refuse and (refusal := self._models.refusal(job.recipe, shapes)):
            return refusal
        self._models.make_room_on_device(job.recipe, shapes)
        return None

    def _pieces(self, run: Run, job: VaeJob, vae: RowVae, pixel_width: int) -> tuple[int, int]:
        run.enter(f"bringing {job.recipe.name} to its device")
        batch, pieces = vae.pieces(job.least_pieces, pixel_width)
        if pieces > 1:
            warning = (
                f"memory is short for whole rows ({gb(vae.model.expected_bytes)} on each worker, as ComfyUI estimates "
                f"it), so {pieces} pieces of the width are computed one after the other and blended, as ComfyUI's tiles"
            )
            warn_on_first_rank(logger, [warning], job.recipe.name)
        return batch, pieces

    def _end(self, job: VaeJob) -> None:
        if job.free_memory_after:
            self._models.unload_from_device()
        if self._beside_comfyui:  # whose nodes may need it now, and not all of them ask
            self._models.free_unused()
            cuda_graphs.release_if_full(self._context.device)


class _Output:
    """The decoded rows of this rank: written to the picture's file, or kept to be returned."""

    def __init__(self, run: Run, job: VaeJob, vae: RowVae, images: int) -> None:
        self._run, self._job, self._vae, self._images = run, job, vae, images
        self._dtype = vae.vae.vae_output_dtype()
        self._shape: tuple[int, ...] = ()
        self._rows: Tensor | None = None  # (B, C, [T,] this rank's rows, W)

    def add(self, start: int, rows: Tensor) -> None:
        """Take this rank's rows of the images from `start` on, (b, C, [T,] rows, W) on any device. Collective."""
        if self._rows is None:
            self._rows = self._open(rows)
        target = self._rows[start : start + rows.shape[0]]
        for index, image in enumerate(rows):
            for frames in slices(image, self._dtype):
                part = self._vae.vae.process_output(image[:, frames].to(self._dtype))
                _copy(part, target[index][:, frames])
        self._run.emit(VaeProgress(start + rows.shape[0], self._images))

    def result(self, pieces: int, random: Any) -> VaeResult:
        """Return the result of this rank."""
        assert self._rows is not None, "there is an image"
        rows = None if self._job.picture else _packed(self._rows)
        return VaeResult(self._shape, _name(self._dtype), pieces, random, rows)

    def _open(self, rows: Tensor) -> Tensor:
        heights = of_all_ranks(rows.shape[-2])
        self._shape = (self._images, *rows.shape[1:-2], sum(heights), rows.shape[-1])
        if not self._job.picture:
            return torch.empty((self._images, *rows.shape[1:]), dtype=self._dtype)
        nbytes = torch.Size(self._shape).numel() * self._dtype.itemsize
        left = smallest(available_memory())
        if nbytes + _RESERVE_BYTES > left:
            raise ValueError(
                f"the picture takes {gb(nbytes)} of system memory, and {gb(left)} are left: decode fewer frames, or a "
                f"smaller size, or close other programs"
            )
        if self._run.rank == 0:
            resize_picture(self._job.picture, self._shape, self._dtype)
        any_rank(False)  # the others open it when it has its size
        start = sum(heights[: self._run.rank])
        return open_picture(self._job.picture, self._shape, self._dtype).narrow(-2, start, rows.shape[-2])


def _copy(source: Tensor, target: Tensor) -> None:
    """Copy (..., rows, W) by planes, each of which is contiguous in a picture: PyTorch would copy to the CPU first."""
    for place in itertools.product(*map(range, target.shape[:-2])):
        target[place].copy_(source[place])


def _packed(rows: Tensor) -> SerializedObject:
    return pack(rows, lambda _: None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _no_reference(reference: Any) -> Any:
    raise AssertionError(f"a VAE's job refers to nothing, not {reference}")
