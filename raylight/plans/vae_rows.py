"""Which of ComfyUI's VAE classes can be split by image rows, and why the others cannot.

The rows of a tensor are followed through whatever a VAE computes (`raylight/parallel/rows`), so a class needs little:
how many image rows one latent row stands for, and where its forward makes noise of its own. A class is listed once its
split has been compared with ComfyUI's own result: what depends on the height in ways that no tensor shows (tables made
of a shape's numbers) would give another picture in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class RowRule:
    """How a VAE class is split by rows.

    `ratio` is the number of image rows of one latent row, or a function that reads it from the model. `noise` names the
    methods, as Class.method, that draw noise of their first argument's height and width. `by_memory` names functions of
    the class's Python module whose result depends on the memory of the GPU, and decides in how many parts it computes:
    all ranks have to take the smallest.

    The rest is for speed, as measured: `pointwise` names classes of modules that compute each place of a tensor from
    the channels there, so that their operations need not be followed one by one; `channels_last` keeps images in the
    order of memory in which cuDNN computes.
    """

    ratio: int | Callable[[Any], int]
    noise: tuple[str, ...] = ()
    by_memory: tuple[str, ...] = ()
    pointwise: tuple[str, ...] = ()
    channels_last: bool = False

    def rows_per_latent(self, model: nn.Module) -> int:
        """Return the number of image rows that one latent row of `model` stands for."""
        return self.ratio if isinstance(self.ratio, int) else self.ratio(model)


def _levels(model: Any) -> int:
    """Return the ratio of autoencoders that halve the image between levels (SD, SDXL, Flux, Flux 2, Hunyuan Video)."""
    packed = 2 if getattr(model, "bn", None) is not None else 1
    return packed * 2 ** (model.decoder.num_resolutions - 1)


def _upsamplers(model: Any) -> int:
    """Return the ratio of Hunyuan's autoencoders, which double the image where a stage has an upsampler."""
    return 2 ** sum(hasattr(stage, "upsample") for stage in model.decoder.up)


def _strides(model: Any) -> int:
    """Return the ratio of TAEHV: a factor of 2 for each convolution with a stride, and the patches."""
    strides = [module.stride[0] for module in model.encoder if isinstance(module, nn.Conv2d)]
    return model.patch_size * 2 ** sum(stride == 2 for stride in strides)


LDM = "comfy.ldm"
AUTOENCODER = f"{LDM}.models.autoencoder"

WAN_POINTWISE = ("RMS_norm", "SiLU", "Dropout")

# By class; `AutoencodingEngine` is a frame for others, so its decoder's class decides.
RULES: dict[str, RowRule] = {
    f"{AUTOENCODER}.AutoencoderKL": RowRule(_levels),
    f"{LDM}.modules.diffusionmodules.model.Decoder": RowRule(_levels),
    f"{LDM}.modules.temporal_ae.VideoDecoder": RowRule(_levels),
    f"{LDM}.hunyuan_video.vae.Decoder": RowRule(_upsamplers),
    f"{LDM}.hunyuan_video.vae_refiner.Decoder": RowRule(_upsamplers),
    f"{LDM}.wan.vae.WanVAE": RowRule(8, pointwise=WAN_POINTWISE, channels_last=True),
    f"{LDM}.wan.vae2_2.WanVAE": RowRule(16, pointwise=WAN_POINTWISE, channels_last=True),
    f"{LDM}.lightricks.vae.causal_video_autoencoder.VideoVAE": RowRule(
        32, ("ResnetBlock3D._feed_spatial_noise",), ("get_max_chunk_size",)
    ),
    f"{LDM}.cosmos.vae.CausalContinuousVideoTokenizer": RowRule(8),
    f"{LDM}.genmo.vae.model.VideoVAE": RowRule(8),
    f"{LDM}.cogvideo.vae.AutoencoderKLCogVideoX": RowRule(8),
    f"{LDM}.cascade.stage_a.StageA": RowRule(4),
    f"{LDM}.cascade.stage_c_coder.StageC_coder": RowRule(32),
    "comfy.taesd.taesd.TAESD": RowRule(lambda model: 16 if "Flux2" in type(model.taesd_decoder).__name__ else 8),
    "comfy.taesd.taehv.TAEHV": RowRule(_strides),
}

_SOUND = "it makes sound, which has no rows"
REASONS: dict[str, str] = {
    f"{LDM}.audio.autoencoder.AudioOobleckVAE": _SOUND,
    f"{LDM}.audio.vae_sa3.SA3AudioVAE": _SOUND,
    f"{LDM}.ace.vae.music_dcae_pipeline.MusicDCAE": _SOUND,
    f"{LDM}.mmaudio.vae.autoencoder.AudioAutoencoder": _SOUND,
    f"{LDM}.lightricks.vae.audio_vae.AudioVAE": _SOUND,
    f"{LDM}.minimax.audio_vae.MiniMaxH3AudioVAE": _SOUND,
    f"{LDM}.minimax_music.dav.MiniMaxMusic3DAV": _SOUND,
    f"{LDM}.hunyuan3d.vae.ShapeVAE": "it makes a shape from a set of points, which has no rows",
    f"{LDM}.triposplat.vae.OctreeGaussianDecoder": "it makes a set of Gaussians, which has no rows",
    f"{LDM}.mage_flow.vae.MageVAE": "its attention looks at windows of 512 rows, which no cut may cross",
    f"{LDM}.minimax.vae.MiniMaxH3VideoVAE": "it cuts the picture into tiles of 256 pixels itself, and blends them",
    f"{LDM}.lightricks.vae.na_diffusion_decoder.CausalDiffusionVAE": (
        "its attention looks at neighboring rows, by their place in the whole picture, in a kernel of its own"
    ),
    f"{LDM}.seedvr.vae.VideoAutoencoderKLWrapper": "it cuts large convolutions along the height itself",
    "comfy.pixel_space_convert.PixelspaceConversionVAE": "it computes nothing",
}


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _kind(model: nn.Module) -> str:
    name = _name(type(model))
    return _name(type(model.decoder)) if name == f"{AUTOENCODER}.AutoencodingEngine" else name


def why_not(model: nn.Module) -> str | None:
    """Return why a VAE cannot be split by rows, naming its class, or None if it can."""
    kind = _kind(model)
    if kind in RULES:
        return None
    reason = REASONS.get(kind, "Raylight has no rule for it")
    return f"class {kind.rpartition('.')[2]} cannot be split by rows: {reason}"


def rule_for(model: nn.Module) -> RowRule:
    """Return the rule of a VAE's class. Raises ValueError: it has none; the message says why."""
    reason = why_not(model)
    if reason is not None:
        raise ValueError(reason)
    return RULES[_kind(model)]
