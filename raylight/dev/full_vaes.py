"""VAEs as people have them, without their weights; a smaller width is for tests."""

from __future__ import annotations

from torch import nn

from .vae_zoo import IMAGE, REGULARIZER


def wan(width: int = 96) -> nn.Module:
    """Return the VAE of Wan 2.1 and Qwen Image."""
    from comfy.ldm.wan.vae import WanVAE

    return WanVAE(
        dim=width,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        image_channels=3,
        conv_out_channels=3,
    )


def flux(width: int = 128) -> nn.Module:
    """Return the VAE of Flux, SD3 and Z-Image."""
    from comfy.ldm.models.autoencoder import AutoencodingEngine

    network = "comfy.ldm.modules.diffusionmodules.model"
    config = {**IMAGE, "z_channels": 16, "ch": width, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    return AutoencodingEngine(
        regularizer_config=REGULARIZER,
        encoder_config={"target": f"{network}.Encoder", "params": config},
        decoder_config={"target": f"{network}.Decoder", "params": config},
    )


def flux2(decoder_width: int = 128) -> nn.Module:
    """Return the VAE of Flux.2, whose decoder is published in two widths."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    config = {
        **IMAGE,
        "z_channels": 32,
        "ch": 128,
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "batch_norm_latent": True,
    }
    return AutoencoderKL(ddconfig=config, embed_dim=32, decoder_ddconfig={**config, "ch": decoder_width})
