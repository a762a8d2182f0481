"""The numbers in the templates' notes match ComfyUI's own classes, on PyTorch's meta device."""

from __future__ import annotations

from typing import Any

import comfy.ldm.flux.model
import comfy.ldm.hunyuan_video.model
import comfy.ldm.qwen_image.model
import comfy.ldm.wan.model
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
]


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
    assert architecture.heads == config.get("num_heads", config.get("num_attention_heads"))


def test_every_architecture_is_counted() -> None:
    found = [value for value in vars(models).values() if isinstance(value, (DiffusionFile, tuple))]
    files = [file for value in found for file in (value if isinstance(value, tuple) else (value,))]
    assert {file.architecture for file in files} == {architecture for architecture, *_ in PUBLISHED}


def test_memory() -> None:
    file = models.WAN21_T2V_BF16
    assert file.bytes == 2 and models.WAN21_T2V.bytes == 1
    assert file.whole_gib == pytest.approx(14_288_491_584 * 2 / 2**30)
    assert file.gathered_gib == pytest.approx(4 * 351_394_304 / 2**30)
    assert file.gathered_gib < file.offloaded_gib < file.whole_gib / 8
