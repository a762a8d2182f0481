"""A VAE on one rank, which computes its rows of each result."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
import torch.distributed as dist
from torch import Tensor, nn

from raylight.host.checkpoint import MappedModel
from raylight.host.vae_file import MappedVae
from raylight.parallel import shares
from raylight.parallel.heartbeat import cancellation_point

from .parallel_vae import apply_row_parallel
from .replicated_patcher import ReplicatedPatcher, build_replicated

logger = logging.getLogger(__name__)

_CALLS_BETWEEN_CHECKS = 16  # of modules; small VAEs have few of them, and many images are one call
_OVERLAP = 64  # pixels of the picture that two pieces share, as in ComfyUI's tiles
_LEAST_WIDTH = 256  # pixels of a piece
# ComfyUI's estimates are generous, and with more than one piece the picture is no longer that of one GPU.
GENEROSITY = 1.5

_CONVERTED_BYTES = 128 * 2**20  # of a picture, at a time

Consume = Callable[[int, Tensor], None]


class VaeModel(nn.Module):
    """A VAE as a patcher and the cache of models see a model."""

    def __init__(self, vae: comfy.sd.VAE) -> None:
        super().__init__()
        self.diffusion_model = vae.first_stage_model
        self.expected_bytes = 0

    def memory_required(self, _: Any) -> int:
        """Return how many bytes this rank is expected to need beside the weights for what it does next."""
        return self.expected_bytes


class RowVae:
    """A VAE that is split by rows over all ranks. Its weights are whole on each of them."""

    def __init__(self, mapped: MappedVae) -> None:
        """Install the hooks. Raises ValueError: the class cannot be split by rows."""
        self.vae: Any = mapped.vae  # comfy.sd.VAE
        self.has_encoder, self.has_decoder = mapped.has_encoder, mapped.has_decoder
        self._dtypes = mapped.dtypes
        self._ranks = dist.get_world_size()
        self._group: Any = dist.group.WORLD  # stays when the mesh is another one
        if self._ranks > 1:
            apply_row_parallel(self.vae.first_stage_model, self._group)
        self.model = VaeModel(self.vae)
        self._calls = 0
        for module in self.vae.first_stage_model.modules():
            module.register_forward_pre_hook(self._look_for_cancel)

    def build_patcher(self) -> tuple[ReplicatedPatcher, int]:
        """Return a patcher with all weights, and how many bytes of them are this rank's own memory on the host."""
        model: Any = self.model
        mapped = MappedModel(model, self._dtypes, self.vae.device, {}, {})
        patcher, own_bytes = build_replicated(mapped, comfy.model_management.vae_offload_device())
        self.vae.patcher = patcher
        return patcher, own_bytes

    has_graphs = False  # CUDA graphs are of transformers

    def drop_graphs(self) -> None:
        """Do nothing: as `ParallelModel`, whose place it has in the cache."""

    def latent_to_decode(self, latent: Tensor) -> Tensor:
        """Return the latent as the VAE takes it: an image's VAE decodes the first frame of a video."""
        return latent[:, :, 0] if self.vae.latent_dim == 2 and latent.ndim == 5 else latent

    def pixels_to_encode(self, pixels: Tensor) -> Tensor:
        """Return pictures (B, [T,] H, W, C) as the VAE takes them: (B, C, [T,] H, W), cropped and with its channels."""
        vae = self.vae
        pixels = vae.vae_encode_crop_pixels(pixels).movedim(-1, 1)
        if vae.latent_dim == 3 and pixels.ndim < 5:
            return pixels.unsqueeze(2) if vae.not_video else pixels.movedim(1, 0).unsqueeze(0)
        return pixels

    def expect(self, estimate: Callable[..., float], shape: tuple[int, ...]) -> None:
        """Note what ComfyUI estimates for an input of this shape, of which a rank needs its share. All ranks note the
        largest.
        """
        weights = shares.of_rows(self._group) if self._ranks > 1 else ()
        share = max(weights) / sum(weights) if weights else 1 / self._ranks
        self.model.expected_bytes = int(estimate(shape, self.vae.vae_dtype) * share)

    def pieces(self, least: int, pixel_width: int) -> tuple[int, int]:
        """Bring the weights to the device. Return how many images are computed at once, and in how many pieces of the
        width each: several where this rank's share of one image will not fit into what is free. With a `least` above 1,
        after memory ran out, that is one image, however narrow it is. Collective.
        """
        vae, needed = self.vae, max(1, self.model.expected_bytes)
        comfy.model_management.load_models_gpu(
            [vae.patcher], memory_required=needed, force_full_load=vae.disable_offload
        )
        free: Any = vae.patcher.get_free_memory(vae.device)
        wanted = max(least, math.ceil(needed / GENEROSITY / max(1, int(free))))
        most = max(1, pixel_width // _LEAST_WIDTH)
        batch = 1 if least > 1 else max(1, int(free) // needed)
        return batch, min(wanted, most)

    def decode(self, latent: Tensor, batch: int, pieces: int, options: dict[str, Any], consume: Consume) -> None:
        """Decode a latent, (B, C, [T,] H, W), and pass each part of the batch on with the index of its first image:
        this rank's rows, of the dtype that ComfyUI's VAE returns, on any device. Collective.
        """
        vae = self.vae

        def call(part: Tensor) -> Tensor:
            return vae.first_stage_model.decode(part.to(device=vae.device, dtype=vae.vae_dtype), **options)

        for start in range(0, latent.shape[0], batch):
            cancellation_point()
            part = latent[start : start + batch]
            consume(start, call(part) if pieces == 1 else self._in_pieces(part, call, pieces, decodes=True))

    def encode(self, pixels: Tensor, batch: int, pieces: int) -> Tensor:
        """Encode pictures of `pixels_to_encode`. Return this rank's rows of the latent, on the CPU. Collective."""
        vae = self.vae
        chunked = getattr(vae.first_stage_model, "comfy_has_chunked_io", False)

        def call(part: Tensor) -> Tensor:
            if chunked:  # which moves it in parts itself
                ready = vae.process_input(part).to(vae.vae_dtype)
                return vae.first_stage_model.encode(ready, device=vae.device)
            return vae.first_stage_model.encode(self._ready(part))

        found = []
        for start in range(0, pixels.shape[0], batch):
            cancellation_point()
            part = pixels[start : start + batch]
            latent = call(part) if pieces == 1 else self._in_pieces(part, call, pieces, decodes=False)
            found.append(latent.to("cpu", vae.vae_output_dtype()))
        latent = torch.cat(found)
        format_encoded = getattr(vae, "format_encoded", None)
        return latent if format_encoded is None else format_encoded(latent)

    def _ready(self, pixels: Tensor) -> Tensor:
        """Return pictures, (B, C, [T,] H, W), as the VAE's model takes them, on its device.

        They are converted there, image by image and in parts of a video: ComfyUI converts all of a video on the CPU,
        where several ranks would wait for each other's copies of it.
        """
        vae = self.vae
        if vae.device.type == "cpu":
            return vae.process_input(pixels).to(vae.vae_dtype)
        ready = torch.empty(pixels.shape, dtype=vae.vae_dtype, device=vae.device)
        for image, target in zip(pixels, ready, strict=True):
            for frames in slices(image, image.dtype):
                target[:, frames] = vae.process_input(image[:, frames].to(vae.device)).to(vae.vae_dtype)
        return ready

    def _in_pieces(self, value: Tensor, call: Callable[[Tensor], Tensor], pieces: int, decodes: bool) -> Tensor:
        """Compute pieces of the width one after the other, of all rows each, and blend them as ComfyUI's tiles.

        Return this rank's rows, on the CPU.
        """
        vae = self.vae
        ratio, formulas, unit = (
            (vae.upscale_ratio, vae.upscale_index_formula, vae.spacial_compression_decode())
            if decodes
            else (vae.downscale_ratio, vae.downscale_index_formula, vae.spacial_compression_encode())
        )
        # In columns of the value. Each piece of pixels begins where a column of the latent does.
        overlap, step = (_OVERLAP // unit, 1) if decodes else (_OVERLAP, unit)
        each = math.ceil((value.shape[-1] - overlap) / pieces / step) * step + overlap
        first = call(value[:1, ..., :each])  # how many rows and channels there are is known then
        known = [first]

        def next_piece(part: Tensor) -> Tensor:
            return (known.pop() if known else call(part)).to(dtype=vae.vae_output_dtype())

        in_time: list[Any] = [value.shape[2], 0, ratio[0], formulas[0]] if value.ndim == 5 else []
        in_rows: list[Any] = [value.shape[-2], 0, lambda _: first.shape[-2], 1]
        in_columns: list[Any] = [each, overlap, unit, unit]
        tile, overlaps, scales, positions = zip(*filter(None, (in_time, in_rows, in_columns)), strict=True)
        blend: Any = comfy.utils.tiled_scale_multidim
        return blend(
            value,
            next_piece,
            tile=tile,
            overlap=overlaps,
            upscale_amount=scales,
            out_channels=first.shape[1],
            output_device="cpu",
            downscale=not decodes,
            index_formulas=positions,
        )

    def _look_for_cancel(self, *_: Any) -> None:
        self._calls += 1
        if self._calls % _CALLS_BETWEEN_CHECKS == 0:
            cancellation_point()


def slices(image: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Yield slices of the frames of (C, T, rows, W) that are small in `dtype`, or one of all of (C, rows, W)."""
    if image.ndim == 3:
        yield slice(None)
        return
    of_frame = max(1, image[:, 0].numel() * dtype.itemsize)
    step = max(1, _CONVERTED_BYTES // of_frame)
    for first in range(0, image.shape[1], step):
        yield slice(first, first + step)
