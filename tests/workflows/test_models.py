"""The numbers in the templates' notes match ComfyUI's own classes, on PyTorch's meta device."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import comfy.ldm.chroma.model
import comfy.ldm.flux.model
import comfy.ldm.hunyuan_video.model
import comfy.ldm.lightricks.av_model
import comfy.ldm.lumina.model
import comfy.ldm.qwen_image.model
import comfy.ldm.wan.model
import comfy.ldm.wan.model_animate
import comfy.ops
import pytest
import torch

from raylight.dev.workflows import models
from raylight.dev.workflows.models import Architecture, DiffusionFile
from raylight.sharding.fsdp import units

_WAN = {
    "dim": 5120,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "text_dim": 4096,
    "out_dim": 16,
    "num_heads": 40,
    "num_layers": 40,
}
_FLUX = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "axes_dim": [16, 56, 56],
    "qkv_bias": True,
    "guidance_embed": True,
}
WAN, VACE = comfy.ldm.wan.model.WanModel, comfy.ldm.wan.model.VaceWanModel

# What ComfyUI detects in the published files.
PUBLISHED: list[tuple[Architecture, Any, dict[str, Any]]] = [
    (models.WAN_14B, WAN, {"model_type": "t2v", "in_dim": 16, **_WAN}),
    (models.WAN_14B_I2V, WAN, {"model_type": "t2v", "in_dim": 36, **_WAN}),
    (
        models.WAN_5B,
        WAN,
        {
            "model_type": "t2v",
            "in_dim": 48,
            **_WAN,
            "out_dim": 48,
            "dim": 3072,
            "ffn_dim": 14336,
            "num_heads": 24,
            "num_layers": 30,
        },
    ),
    (models.WAN_VACE, VACE, {"model_type": "vace", "in_dim": 16, "vace_layers": 8, "vace_in_dim": 96, **_WAN}),
    (
        models.FLUX,
        comfy.ldm.flux.model.Flux,
        {**_FLUX, "depth": 19, "depth_single_blocks": 38, "theta": 10000, "patch_size": 2, "txt_ids_dims": []},
    ),
    (
        models.QWEN_IMAGE,
        comfy.ldm.qwen_image.model.QwenImageTransformer2DModel,
        {"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 3584},
    ),
    (
        models.HUNYUAN_VIDEO,
        comfy.ldm.hunyuan_video.model.HunyuanVideo,
        {
            **_FLUX,
            "depth": 20,
            "depth_single_blocks": 40,
            "theta": 256,
            "patch_size": [1, 2, 2],
            "byt5": False,
            "meanflow": False,
            "use_cond_type_embedding": False,
            "vision_in_dim": None,
            "meanflow_sum": False,
        },
    ),
    (models.WAN_ANIMATE, comfy.ldm.wan.model_animate.AnimateWanModel, {"in_dim": 36, **_WAN}),
    (
        models.FLUX2_KLEIN,
        comfy.ldm.flux.model.Flux,
        {
            "in_channels": 128,
            "out_channels": 128,
            "vec_in_dim": None,
            "context_in_dim": 12288,
            "hidden_size": 4096,
            "mlp_ratio": 3.0,
            "num_heads": 32,
            "depth": 8,
            "depth_single_blocks": 24,
            "axes_dim": [32, 32, 32, 32],
            "theta": 2000,
            "patch_size": 1,
            "qkv_bias": False,
            "guidance_embed": False,
            "txt_ids_dims": [3],
            "global_modulation": True,
            "mlp_silu_act": True,
            "ops_bias": False,
        },
    ),
    (
        models.Z_IMAGE,
        comfy.ldm.lumina.model.NextDiT,
        {
            "patch_size": 2,
            "in_channels": 16,
            "cap_feat_dim": 2560,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "qk_norm": True,
            "dim": 3840,
            "n_heads": 30,
            "n_kv_heads": 30,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "ffn_dim_multiplier": 8.0 / 3.0,
            "z_image_modulation": True,
        },
    ),
    (
        models.CHROMA1,
        comfy.ldm.chroma.model.Chroma,
        {
            "in_channels": 64,
            "out_channels": 64,
            "vec_in_dim": None,
            "context_in_dim": 4096,
            "hidden_size": 3072,
            "mlp_ratio": 4.0,
            "num_heads": 24,
            "depth": 19,
            "depth_single_blocks": 38,
            "axes_dim": [16, 56, 56],
            "theta": 10000,
            "patch_size": 2,
            "qkv_bias": True,
            "in_dim": 64,
            "out_dim": 3072,
            "hidden_dim": 5120,
            "n_layers": 5,
            "txt_ids_dims": [],
        },
    ),
    (models.LTX2, comfy.ldm.lightricks.av_model.LTXAVModel, {"num_attention_heads": 32}),
]
if importlib.util.find_spec("comfy.ldm.minimax") is not None:  # from ComfyUI 0.30 on
    _kind = importlib.import_module("comfy.ldm.minimax.model").MiniMaxH3Model
    # Its file has a table of the time embedding in the place of the layers that compute it.
    PUBLISHED.append((models.MINIMAX_H3, _kind, {"adaln_curve_grid": 1001, "time_embed_dim": 16}))


@pytest.mark.parametrize(("architecture", "kind", "config"), PUBLISHED, ids=lambda v: getattr(v, "name", ""))
def test_weight_counts(architecture: Architecture, kind: Any, config: dict[str, Any]) -> None:
    model = kind(dtype=torch.bfloat16, device="meta", operations=comfy.ops.disable_weight_init, **config)
    blocks = [sum(p.numel() for p in block.parameters()) for block in units(model).values()]
    weights = sum(p.numel() for p in model.parameters())
    assert (architecture.weights, architecture.largest_block, architecture.outside) == (
        weights,
        max(blocks),
        weights - sum(blocks),
    )
    assert architecture.heads == next(
        heads for name in ("num_heads", "num_attention_heads", "n_heads") if (heads := _read(kind, config, name))
    )


def _read(kind: Any, config: dict[str, Any], name: str) -> int | None:
    """Return an option of a class, or its default."""
    parameter = inspect.signature(kind).parameters.get(name)
    return config.get(name, parameter and parameter.default)


def test_every_architecture_is_counted() -> None:
    found = [value for value in vars(models).values() if isinstance(value, (DiffusionFile, tuple))]
    files = [file for value in found for file in (value if isinstance(value, tuple) else (value,))]
    counted = {architecture for architecture, *_ in PUBLISHED}
    assert {file.architecture for file in files} - {models.MINIMAX_H3} == counted - {models.MINIMAX_H3}


def test_memory() -> None:
    file = models.WAN21_T2V_BF16
    assert file.bytes == 2 and models.WAN21_T2V.bytes == 1
    assert file.whole_gib == pytest.approx(14_288_491_584 * 2 / 2**30)
    assert file.gathered_gib == pytest.approx(4 * 351_394_304 / 2**30)
    assert file.gathered_gib < file.offloaded_gib < file.whole_gib / 8
