"""Errors that all workers meet: the message is ComfyUI's, the workers stay, and the next image is right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fault_server import JOB, FaultServer, assert_same, dropin

from raylight.dev.demo.comfy_replies import PromptFailed
from raylight.dev.demo.graphs import Graph, on_workers, stock

pytestmark = pytest.mark.slow

LORA = {"lora_name": "lora.safetensors", "strength_model": 1.0}
ALL_RANKS = {"rank": -1, "what": "raise"}
INJECTED = "ArithmeticError: the injected fault"


def patched(graph: Graph, node: str, **inputs: Any) -> Graph:
    """Add a node between the model and the sampler of a graph."""
    sampler = graph["sample"]["inputs"]
    graph["patch"] = {"class_type": node, "inputs": {"model": sampler["model"], **inputs}}
    sampler["model"] = ["patch", 0]
    return graph


def message_of(server: FaultServer, graph: Graph) -> str:
    with pytest.raises(PromptFailed) as error:
        server.run(graph, timeout=120)
    return str(error.value)


@pytest.mark.parametrize("initializer", [{}, {"FSDP": True}], ids=["replicated", "FSDP"])
@pytest.mark.parametrize(
    ("node", "inputs"),
    [
        ("RenormCFG", {"cfg_trunc": 100.0, "renorm_cfg": 1.0}),
        ("HyperTile", {"tile_size": 256, "swap_size": 2, "max_depth": 0, "scale_depth": False}),
    ],
)
def test_a_node_that_fails_in_stock_too(
    node: str, inputs: dict[str, Any], initializer: dict[str, bool], server: FaultServer, reference: torch.Tensor
) -> None:
    assert_same(server.latent(dropin(JOB, 2, **initializer)), reference)
    before = server.workers()
    theirs = message_of(server, patched(stock(JOB), node, **inputs))
    ours = message_of(server, patched(dropin(JOB, 2, **initializer), node, **inputs))
    assert ours == theirs and server.workers() == before
    # Another seed: ComfyUI would run nothing for the same graph.
    other = replace(JOB, seed=5)
    assert_same(server.latent(dropin(other, 2, **initializer)), server.latent(stock(other)))
    assert server.workers() == before, "an error that all ranks meet ends no worker"


def test_a_lora_that_fails_in_stock_too(server: FaultServer, reference: torch.Tensor) -> None:
    assert_same(server.latent(on_workers(JOB, 2)), reference)
    before, lora = server.workers(), {"lora_name": "set.safetensors", "strength_model": 1.0}
    theirs = message_of(server, patched(stock(JOB), "LoraLoaderModelOnly", **lora))
    ours = message_of(server, patched(dropin(JOB, 2), "LoraLoaderModelOnly", **lora))
    assert "blocks.0.self_attn.q.weight cannot be applied to a weight of 384 x 384" in ours  # before any step
    assert theirs.rpartition("RuntimeError: ")[2] in ours
    other = replace(JOB, seed=6)
    assert_same(server.latent(on_workers(other, 2)), server.latent(stock(other)))
    assert server.workers() == before


@pytest.mark.parametrize("initializer", [{}, {"FSDP": True}], ids=["replicated", "FSDP"])
@pytest.mark.parametrize("where", ["block", "model"])
def test_in_the_middle_of_a_step(
    where: str, initializer: dict[str, bool], server: FaultServer, reference: torch.Tensor
) -> None:
    assert_same(server.latent(on_workers(JOB, 2, **initializer)), reference)
    before = server.workers()
    server.fails(server.submit(dropin(JOB, 2, ALL_RANKS | {"where": where, "call": 3}, **initializer)), INJECTED)
    # Weights that were gathered for the failed step must not be used with other patches on the shards.
    seed = 11 if where == "block" else 12
    with_lora = patched(dropin(replace(JOB, seed=seed), 2, **initializer), "LoraLoaderModelOnly", **LORA)
    theirs = patched(stock(replace(JOB, seed=seed)), "LoraLoaderModelOnly", **LORA)
    assert_same(server.latent(with_lora), server.latent(theirs))
    assert server.workers() == before
