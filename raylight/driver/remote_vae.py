"""The drop-in VAE: ComfyUI's VAE, whose decoding and encoding is done by workers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import comfy.sd
from comfy.cli_args import args
from torch import Tensor

from raylight.attention import kernels
from raylight.cluster import active_session
from raylight.host.recipe import WorkerConfig
from raylight.parallel.rows.row_tensor import RowsError
from raylight.plans.vae_rows import why_not

from .vae_import import CannotBuild, recipe_of
from .vae_run import VaeRun

logger = logging.getLogger(__name__)

_NO_TILES = "the sizes of tiles have no effect: workers split the rows of the picture, which needs no tiles"


class RemoteVAE(comfy.sd.VAE):
    """A VAE for every node of ComfyUI. It has all that ComfyUI's own has, and what it decodes and encodes is split by
    rows over the workers. What they cannot split it does in this process, as ComfyUI does, and the log says why.
    """

    workers: WorkerConfig | None
    path: str

    @classmethod
    def of(cls, vae: comfy.sd.VAE, workers: WorkerConfig | None, path: str = "") -> RemoteVAE:
        """Return the same VAE on these workers, or on those that run when it is used. `path` is its file, if known."""
        remote = object.__new__(cls)
        vars(remote).update(vars(vae))
        remote.workers, remote.path = workers, path or getattr(vae, "path", "")
        return remote

    def __copy__(self) -> RemoteVAE:
        return RemoteVAE.of(self, self.workers)

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteVAE:
        """Stay on the workers, as nodes copy a VAE to change it: what they change is found when it is used."""
        remote = memo[id(self)] = object.__new__(RemoteVAE)
        workers = {"workers": self.workers}
        vars(remote).update(copy.deepcopy({k: v for k, v in vars(self).items() if k not in workers}, memo) | workers)
        return remote

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Be ComfyUI's own VAE in another process, which has no workers."""
        logger.info("a node sends the VAE to another process, where it decodes and encodes as without workers")
        return _plain, ({name: value for name, value in vars(self).items() if name not in ("workers", "path")},)

    def decode(self, samples_in: Tensor, vae_options: dict[str, Any] | None = None) -> Tensor:
        """Return the picture of a latent, (B, C, [T,] H, W), as (B, [T,] H, W, C).

        Raises ValueError: for a latent that is not of this VAE. Raises what `workers.ask_all` raises.
        """
        options = vae_options or {}

        def on_workers(run: VaeRun) -> Tensor:
            self._check_latent(samples_in)
            return run.decode(samples_in, options).movedim(1, -1)

        return self._done("decodes", on_workers, lambda: comfy.sd.VAE.decode(self, samples_in, options))

    def decode_tiled(self, samples: Tensor, *tile: Any, **tiles: Any) -> Tensor:
        """Return the picture of a latent as `decode`, without tiles: each worker has a part of the rows anyway."""

        def on_workers(run: VaeRun) -> Tensor:
            self._check_latent(samples)
            logger.info(_NO_TILES)
            return run.decode(samples, {}).movedim(1, -1)

        return self._done("decodes", on_workers, lambda: comfy.sd.VAE.decode_tiled(self, samples, *tile, **tiles))

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """Return the latent of pictures, (B, [T,] H, W, C).

        Raises ValueError: for what is no picture or video. Raises what `workers.ask_all` raises.
        """

        def on_workers(run: VaeRun) -> Tensor:
            self._check_pixels(pixel_samples)
            return run.encode(pixel_samples)

        return self._done("encodes", on_workers, lambda: comfy.sd.VAE.encode(self, pixel_samples))

    def encode_tiled(self, pixel_samples: Tensor, *tile: Any, **tiles: Any) -> Tensor:
        """Return the latent of pictures as `encode`, without tiles."""

        def on_workers(run: VaeRun) -> Tensor:
            self._check_pixels(pixel_samples)
            logger.info(_NO_TILES)
            return run.encode(pixel_samples)

        return self._done("encodes", on_workers, lambda: comfy.sd.VAE.encode_tiled(self, pixel_samples, *tile, **tiles))

    def _done(self, does: str, on_workers: Callable[[VaeRun], Tensor], here: Callable[[], Tensor]) -> Tensor:
        """Do it on workers, or here, and log why, if they cannot. `does` is what the VAE does, as a verb."""
        self.throw_exception_if_invalid()
        try:
            return on_workers(self._run()).to(self.output_device)
        except (CannotBuild, RowsError) as reason:
            logger.info("the VAE %s in ComfyUI's process, as without workers: %s", does, reason)
        return here()

    def _run(self) -> VaeRun:
        """Return the run of this VAE on its workers. Raises CannotBuild: they cannot run it."""
        workers = self._workers()
        dtype = str(self.vae_dtype).removeprefix("torch.")
        is_same_device = workers.config.device_type == self.device.type
        run = VaeRun(self, workers, recipe_of(self, dtype if is_same_device else "", self.path))
        if run.recipe.export is not None and not workers.config.is_local:
            raise CannotBuild("its weights are in no file, and workers of a Ray cluster may be on other machines")
        return run

    def _workers(self) -> WorkerConfig:
        """Return the workers to use. Raises CannotBuild: it cannot be split, or there are no workers."""
        model: Any = self.first_stage_model
        if reason := why_not(model):
            raise CannotBuild(reason)
        if args.cpu_vae:
            raise CannotBuild("ComfyUI was started with --cpu-vae")
        session = active_session.running()
        if session is not None and session.busy:  # a node looks at a step, say, and the workers would wait for it
            raise CannotBuild("the workers are in a run")
        if self.workers is not None:
            return self.workers
        if session is None:
            raise CannotBuild("no workers are running")
        return WorkerConfig(session.config, kernels.AUTO)

    def _check_latent(self, latent: Tensor) -> None:
        wanted = self.latent_dim + 2
        if latent.ndim != wanted and not (wanted == 4 and latent.ndim == 5):
            raise ValueError(
                f"the latent has the shape {tuple(latent.shape)}, and the VAE takes {_dimensions(self.latent_dim)}: it "
                f"was made for another model. Choose the VAE of the model that made the latent"
            )
        if latent.shape[1] != self.latent_channels:
            raise ValueError(
                f"the latent has {latent.shape[1]} channels, and the VAE takes {self.latent_channels}: it was made for "
                f"another model. Choose the VAE of the model that made the latent"
            )

    def _check_pixels(self, pixels: Tensor) -> None:
        if pixels.ndim != 4 and not (pixels.ndim == 5 and self.latent_dim == 3):
            raise ValueError(
                f"the VAE encodes pictures (images, height, width, channels), and was given the shape "
                f"{tuple(pixels.shape)}"
            )
        least: Any = self.spacial_compression_encode()
        if min(pixels.shape[-3:-1]) < least:
            raise ValueError(
                f"a picture of {pixels.shape[-2]} x {pixels.shape[-3]} pixels is too small for this VAE: at least "
                f"{least} x {least}"
            )


def _plain(state: dict[str, Any]) -> comfy.sd.VAE:
    vae = object.__new__(comfy.sd.VAE)
    vars(vae).update(state)
    return vae


def _dimensions(count: int) -> str:
    return {2: "images (B, channels, height, width)", 3: "videos (B, channels, frames, height, width)"}[count]
