"""Every VAE that Raylight splits by rows, at tiny width with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

AUTOENCODER = "comfy.ldm.models.autoencoder"
REGULARIZER = {"target": f"{AUTOENCODER}.DiagonalGaussianRegularizer"}
# Group norms have 32 groups, so 32 channels are the least.
IMAGE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
HUNYUAN = {
    "in_channels": 3,
    "out_channels": 3,
    "num_res_blocks": 1,
    "z_channels": 16,
    "downsample_match_channel": True,
    "upsample_match_channel": True,
}
WAN = {"dim_mult": [1, 2, 2, 2], "num_res_blocks": 1, "attn_scales": [], "temperal_downsample": [False, True, True]}


@dataclass(frozen=True)
class TinyVae:
    """A VAE class: `build` makes the model; `latent` and `image` are shapes whose heights do not divide."""

    build: Callable[[], nn.Module]
    latent: tuple[int, ...]
    image: tuple[int, ...]


def _engine(encoder: str, decoder: str, encoder_config: dict[str, Any], decoder_config: dict[str, Any]) -> nn.Module:
    from comfy.ldm.models.autoencoder import AutoencodingEngine

    return AutoencodingEngine(
        regularizer_config=REGULARIZER,
        encoder_config={"target": encoder, "params": encoder_config},
        decoder_config={"target": decoder, "params": decoder_config},
    )


def _kl(**changes: Any) -> nn.Module:
    from comfy.ldm.models.autoencoder import AutoencoderKL

    config = {**IMAGE, **changes}
    return AutoencoderKL(ddconfig=config, embed_dim=config["z_channels"])


def _flux() -> nn.Module:
    model = "comfy.ldm.modules.diffusionmodules.model"
    config = {**IMAGE, "z_channels": 16}
    return _engine(f"{model}.Encoder", f"{model}.Decoder", config, config)


def _svd() -> nn.Module:
    decoder = {**IMAGE, "video_kernel_size": [3, 1, 1], "alpha": 0.0}
    encoder = "comfy.ldm.modules.diffusionmodules.model.Encoder"
    return _engine(encoder, "comfy.ldm.modules.temporal_ae.VideoDecoder", IMAGE, decoder)


def _hunyuan_image() -> nn.Module:
    config = {**HUNYUAN, "block_out_channels": [32, 32, 64, 64], "ffactor_spatial": 8}
    place = "comfy.ldm.hunyuan_video.vae"
    return _engine(f"{place}.Encoder", f"{place}.Decoder", config, config)


def _hunyuan_refiner(refiner: bool) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from comfy.ldm.models.autoencoder import AutoencodingEngine

        config = {
            **HUNYUAN,
            "block_out_channels": [32, 64, 64, 64],
            "ffactor_spatial": 8,
            "ffactor_temporal": 4,
            "refiner_vae": refiner,
        }
        place = "comfy.ldm.hunyuan_video.vae_refiner"
        kind = "EmptyRegularizer" if refiner else "DiagonalGaussianRegularizer"
        return AutoencodingEngine(
            regularizer_config={"target": f"{AUTOENCODER}.{kind}"},
            encoder_config={"target": f"{place}.Encoder", "params": config},
            decoder_config={"target": f"{place}.Decoder", "params": config},
        )

    return build


def _wan() -> nn.Module:
    from comfy.ldm.wan.vae import WanVAE

    return WanVAE(dim=8, z_dim=16, image_channels=3, conv_out_channels=3, **WAN)


def _wan22() -> nn.Module:
    from comfy.ldm.wan.vae2_2 import WanVAE

    return WanVAE(dim=8, dec_dim=8, z_dim=16, **WAN)


def ltx_config(version: int) -> dict[str, Any]:
    """Return the configuration of an LTX VAE with few layers of little width."""
    from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE

    config = VideoVAE.get_default_config(None, version)  # type: ignore[arg-type]
    for name in ("blocks", "encoder_blocks", "decoder_blocks"):
        if name in config:
            config[name] = [[kind, _one_layer(given)] for kind, given in config[name]]
    return {**config, "encoder_base_channels": 16, "decoder_base_channels": 16}


def _ltx(version: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE

        return VideoVAE(config=ltx_config(version))

    return build


def _one_layer(given: Any) -> Any:
    if isinstance(given, int):
        return 1
    return {**given, "num_layers": 1} if "num_layers" in given else given


def _cosmos() -> nn.Module:
    from comfy.ldm.cosmos.vae import CausalContinuousVideoTokenizer

    return CausalContinuousVideoTokenizer(
        z_channels=8,
        latent_channels=8,
        z_factor=1,
        resolution=256,
        in_channels=3,
        out_channels=3,
        channels=16,
        channels_mult=[2, 4, 4],
        num_res_blocks=1,
        attn_resolutions=[32],
        dropout=0.0,
        patch_size=4,
        num_groups=1,
        temporal_compression=8,
        spacial_compression=8,
    )


def _mochi() -> nn.Module:
    from comfy.ldm.genmo.vae.model import Decoder, Encoder, VideoVAE

    model = VideoVAE.__new__(VideoVAE)
    nn.Module.__init__(model)
    model.encoder = Encoder(
        in_channels=15,
        base_channels=32,
        channel_multipliers=[1, 2, 3, 4],
        num_res_blocks=[1, 1, 1, 1, 1],
        latent_dim=12,
        temporal_reductions=[1, 2, 3],
        spatial_reductions=[2, 2, 2],
        prune_bottlenecks=[False] * 5,
        has_attentions=[False, True, True, True, True],
        input_is_conv_1x1=True,
        padding_mode="replicate",
    )
    model.decoder = Decoder(
        out_channels=3,
        base_channels=32,
        channel_multipliers=[1, 2, 3, 4],
        temporal_expansions=[1, 2, 3],
        spatial_expansions=[2, 2, 2],
        num_res_blocks=[1, 1, 1, 1, 1],
        latent_dim=12,
        has_attention=[False] * 5,
        padding_mode="replicate",
        output_norm=False,
        nonlinearity="silu",
        output_nonlinearity="silu",
        causal=True,
    )
    return model


def _cogvideo() -> nn.Module:
    from comfy.ldm.cogvideo.vae import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(block_out_channels=(32, 32, 64, 64), layers_per_block=1)


def _stage_a() -> nn.Module:
    from comfy.ldm.cascade.stage_a import StageA

    return StageA(bottleneck_blocks=2, c_hidden=32, codebook_size=16)


def _stage_c() -> nn.Module:
    from comfy.ldm.cascade.stage_c_coder import Previewer, StageC_coder

    model = StageC_coder()
    model.previewer = Previewer(c_hidden=32)
    return model


def _taesd(channels: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from comfy.taesd.taesd import TAESD

        return TAESD(latent_channels=channels)

    return build


def _taehv(channels: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from comfy.taesd.taehv import TAEHV

        return TAEHV(latent_channels=channels)

    return build


VAES: dict[str, TinyVae] = {
    "SD, SDXL": TinyVae(_kl, (2, 4, 11, 6), (1, 3, 88, 48)),
    "Flux, SD3, Z-Image": TinyVae(_flux, (1, 16, 11, 6), (2, 3, 88, 48)),
    "Flux 2": TinyVae(lambda: _kl(batch_norm_latent=True), (1, 16, 9, 4), (1, 3, 144, 64)),
    "SD x4 upscaler": TinyVae(lambda: _kl(ch_mult=[1, 2, 2]), (1, 4, 11, 6), (1, 3, 44, 24)),
    "SVD": TinyVae(_svd, (3, 4, 11, 6), (3, 3, 88, 48)),
    "Hunyuan Video": TinyVae(lambda: _kl(conv3d=True, time_compress=4), (1, 4, 3, 11, 6), (1, 3, 9, 88, 48)),
    "Hunyuan Image 2.1": TinyVae(_hunyuan_image, (1, 16, 11, 6), (1, 3, 88, 48)),
    "Hunyuan Image 2.1 refiner": TinyVae(_hunyuan_refiner(False), (1, 16, 2, 11, 6), (1, 3, 1, 88, 48)),
    "Hunyuan Video 1.5": TinyVae(_hunyuan_refiner(True), (1, 16, 3, 11, 6), (1, 3, 9, 88, 48)),
    "Wan 2.1, Qwen Image": TinyVae(_wan, (1, 16, 4, 11, 6), (1, 3, 13, 88, 48)),
    "Wan 2.1, one frame": TinyVae(_wan, (1, 16, 1, 11, 6), (1, 3, 1, 88, 48)),
    "Wan 2.2 5B": TinyVae(_wan22, (1, 16, 4, 9, 4), (1, 3, 13, 144, 64)),
    "LTX Video 0.9": TinyVae(_ltx(0), (1, 128, 3, 9, 4), (1, 3, 17, 288, 128)),
    "LTX Video 0.9.1": TinyVae(_ltx(1), (1, 128, 3, 9, 4), (1, 3, 17, 288, 128)),
    "LTX Video 0.9.5, LTX 2": TinyVae(_ltx(2), (1, 128, 3, 9, 4), (1, 3, 17, 288, 128)),
    "Cosmos": TinyVae(_cosmos, (1, 8, 2, 11, 6), (1, 3, 9, 88, 48)),
    "Mochi": TinyVae(_mochi, (1, 12, 2, 11, 6), (1, 3, 7, 88, 48)),
    "CogVideoX": TinyVae(_cogvideo, (1, 16, 3, 11, 6), (1, 3, 9, 88, 48)),
    "Cascade, stage A": TinyVae(_stage_a, (1, 4, 19, 8), (1, 3, 76, 32)),
    "Cascade, stage C": TinyVae(_stage_c, (1, 16, 11, 6), (1, 3, 352, 64)),
    "TAESD": TinyVae(_taesd(16), (1, 16, 11, 6), (1, 3, 88, 48)),
    "TAESD of Flux 2": TinyVae(_taesd(128), (1, 128, 9, 4), (1, 3, 144, 64)),
    "TAEHV (Wan 2.1)": TinyVae(_taehv(16), (1, 16, 3, 11, 6), (1, 3, 9, 88, 48)),
    "TAEHV (Wan 2.2)": TinyVae(_taehv(48), (1, 48, 3, 9, 4), (1, 3, 9, 144, 64)),
    "TAEHV (LTX 2)": TinyVae(_taehv(128), (1, 128, 3, 9, 4), (1, 3, 17, 288, 128)),
}


def with_random_weights(model: nn.Module, seed: int = 5) -> nn.Module:
    """Give a model weights that keep activations near 1, and let no parameter or statistic be 0, 1 or unset."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and min(weight.shape[1:]) >= 1 and weight.shape[1:].numel() > 1:
                weight.copy_(draw(weight) / weight.shape[1:].numel() ** 0.5)
            elif name.endswith("bias"):
                weight.copy_(0.1 * draw(weight))
            else:
                weight.copy_(1 + 0.1 * draw(weight))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_var", "std-of-means")):
                buffer.copy_(1 + 0.2 * draw(buffer).abs())
            elif name.endswith(("running_mean", "mean-of-means")):
                buffer.copy_(0.2 * draw(buffer))
    return model.eval()
