"""What docs/compose.md says of caches, compilation, attention of packs and few-step LoRAs: the latent of stock ComfyUI,
with the tokens split.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from shared_server import MODEL, SharedServer

from raylight.dev.demo.graphs import Graph, Sampling, node, on_workers, stock

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


def chain(job: Sampling, steps: Steps, on_ray: bool = False) -> Graph:
    """Return a graph with these nodes between its loader and its sampler."""
    graph, last = stock(job), "model"
    if on_ray:
        graph["workers"] = on_workers(job, 2)["workers"]
        graph["model"] = node("RayModelLoader", **graph["model"]["inputs"], ray_actors_init=["workers", 0])
    for name, step in steps.items():
        graph[name] = node(step["class_type"], **step["inputs"], model=[last, 0])
        last = name
    graph["sample"]["inputs"]["model"] = [last, 0]
    return graph


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.std()).item()


@pytest.mark.parametrize("name", [*GRAPHS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_equals_stock_with_split_tokens(server: SharedServer, name: str) -> None:
    job, steps = (GRAPHS | SLOW)[name]
    expected = server.latent(chain(job, steps))
    if name != "ModelAttentionBackend":
        assert error(expected, server.latent(chain(job, {}))) > 1e-3, "it changes nothing"
    began = server.log.stat().st_size
    assert error(server.latent(chain(job, steps, on_ray=True)), expected) <= 1e-4
    assert "needs all tokens" not in server.log.read_bytes()[began:].decode(errors="replace")
