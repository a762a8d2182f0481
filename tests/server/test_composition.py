"""What docs/compose.md says of caches, compilation, attention of packs and few-step LoRAs: the latent of stock ComfyUI,
with the tokens split.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from server_graphs import chain, on_ray
from shared_server import MODEL, SharedServer

from raylight.dev.demo.graphs import Sampling, node, stock

JOB = Sampling(MODEL, width=112, height=80, frames=9, steps=6, seed=11)
TURBO = replace(JOB, steps=4, cfg=1.0, sampler="lcm")
CACHE = {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
Steps = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def server(shared_server: SharedServer) -> SharedServer:
    shared_server.add_lora("turbo.safetensors", ["lora"], 3)
    return shared_server


SAGE = node("ForeignAttention")
GRAPHS: dict[str, tuple[Sampling, Steps]] = {
    "LazyCache": (JOB, {"cache": node("LazyCache", **CACHE)}),
    "attention of a pack": (JOB, {"sage": SAGE}),
    "few-step LoRA": (
        TURBO,
        {
            "lora": node("LoraLoaderModelOnly", lora_name="turbo.safetensors", strength_model=0.8),
            "shift": node("ModelSamplingSD3", shift=8.0),
        },
    ),
}
SLOW: dict[str, tuple[Sampling, Steps]] = {
    "EasyCache around the attention of a pack": (JOB, {"sage": SAGE, "cache": node("EasyCache", **CACHE)}),
    "EasyCache around a compiled model": (
        JOB,
        {"compile": node("TorchCompileModel", backend="cudagraphs"), "cache": node("EasyCache", **CACHE)},
    ),
}
if hasattr(ModelPatcher, "set_model_optimized_attention"):  # ComfyUI from 0.31 on
    GRAPHS["ModelAttentionBackend"] = (JOB, {"backend": node("ModelAttentionBackend", attention="pytorch attention")})


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.std()).item()


@pytest.mark.parametrize("name", [*GRAPHS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_equals_stock_with_split_tokens(server: SharedServer, name: str) -> None:
    job, steps = (GRAPHS | SLOW)[name]
    graph = chain(stock(job), steps)
    expected = server.latent(graph)
    if name != "ModelAttentionBackend":
        assert error(expected, server.latent(stock(job))) > 1e-3, "it changes nothing"
    began = server.log.stat().st_size
    assert error(server.latent(on_ray(graph)), expected) <= 1e-4
    assert "needs all tokens" not in server.log.read_bytes()[began:].decode(errors="replace")
