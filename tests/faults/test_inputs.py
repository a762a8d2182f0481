"""Wrong inputs: refused by name before any worker samples; the workers stay."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fault_server import JOB, FaultServer, assert_same

from raylight.dev.demo.comfy_replies import PromptFailed, PromptRejected
from raylight.dev.demo.graphs import Graph, on_workers


def with_lora(name: str) -> Graph:
    graph = on_workers(JOB, 2)
    graph["lora"] = {"class_type": "RayLoraLoader", "inputs": {"lora_name": name, "strength_model": 1.0}}
    graph["model"]["inputs"]["lora"] = ["lora", 0]
    return graph


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (on_workers(replace(JOB, model="truncated.safetensors"), 2), "truncated.safetensors"),
        (on_workers(replace(JOB, model="corrupt.safetensors"), 2), "corrupt.safetensors"),
        (on_workers(replace(JOB, model="architecture.safetensors"), 2), "architecture.safetensors"),
        (with_lora("unfit.safetensors"), "unfit.safetensors"),
    ],
    ids=["truncated", "corrupt", "wrong architecture", "LoRA of wrong shapes"],
)
def test_refused(graph: Graph, message: str, server: FaultServer, reference: torch.Tensor) -> None:
    assert_same(server.latent(on_workers(JOB, 2)), reference)
    before = server.workers()
    server.fails(server.submit(graph), message)
    assert_same(server.latent(on_workers(JOB, 2)), reference)
    assert server.workers() == before, "a refusal ends no worker"


def test_a_file_that_vanishes(server: FaultServer, reference: torch.Tensor, folder: Path) -> None:
    there, away = folder / "models" / "vanishing.safetensors", folder / "away.safetensors"
    shutil.copy(folder / "models" / JOB.model, there)
    assert_same(server.latent(on_workers(JOB, 2)), reference)
    prompt = server.submit(on_workers(replace(JOB, model="vanishing.safetensors", seed=3), 2))
    server.wait(prompt, timeout=120)
    there.rename(away)
    # Workers have it loaded; ComfyUI itself refuses a name that is in no folder.
    with pytest.raises((PromptRejected, PromptFailed), match="vanishing.safetensors"):
        server.run(on_workers(replace(JOB, model="vanishing.safetensors", seed=4), 2), timeout=60)
    assert_same(server.latent(on_workers(JOB, 2)), reference)


def test_degrees_that_do_not_multiply(server: FaultServer, reference: torch.Tensor) -> None:
    with pytest.raises(PromptRejected, match="ulysses_degree = 3 .* makes 3 workers, but GPU = 2"):
        server.submit(on_workers(JOB, 2, ulysses_degree=3))
    assert_same(server.latent(on_workers(JOB, 2)), reference)
