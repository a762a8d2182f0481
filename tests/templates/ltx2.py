"""What LTX-2's files hold besides the transformer: VAEs of picture and sound, and the upsampler, at tiny width."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from raylight.dev import vae_zoo

_SOUND = {
    "double_z": True,
    "mel_bins": 64,
    "z_channels": 8,
    "resolution": 256,
    "downsample_time": False,
    "in_channels": 2,
    "out_ch": 2,
    "ch": 16,
    "ch_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
    "mid_block_add_attention": False,
    "norm_type": "pixel",
    "causality_axis": "height",
}
# ComfyUI reads all widths from the metadata of the checkpoint.
CONFIG: dict[str, Any] = {
    "vae": vae_zoo.ltx_config(2),
    "audio_vae": {
        "model": {"params": {"ddconfig": _SOUND, "sampling_rate": 16000}},
        "preprocessing": {"stft": {"filter_length": 1024, "hop_length": 160}},
    },
    "vocoder": {"upsample_initial_channel": 32},
}
# The same for the file of the upsampler.
UPSAMPLER = {"in_channels": 128, "mid_channels": 32, "num_blocks_per_stage": 1, "dims": 3}


def vaes() -> dict[str, Tensor]:
    """Return the tensors of both VAEs, by their names in the checkpoint."""
    from comfy.ldm.lightricks.vae.audio_vae import AudioVAE
    from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE

    picture = _tensors(VideoVAE(version=2, config=CONFIG["vae"]))
    sound = _tensors(AudioVAE({"config": json.dumps(CONFIG)}))
    return {f"vae.{name}": tensor for name, tensor in picture.items()} | {
        name.replace("autoencoder.", "audio_vae.", 1): tensor for name, tensor in sound.items()
    }


def upsampler() -> dict[str, Tensor]:
    """Return the tensors of the upsampler of latents."""
    from comfy.ldm.lightricks.latent_upsampler import LatentUpsampler

    return _tensors(LatentUpsampler.from_config(UPSAMPLER, torch.nn))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.contiguous() for name, tensor in vae_zoo.with_random_weights(model.float()).state_dict().items()
    }
