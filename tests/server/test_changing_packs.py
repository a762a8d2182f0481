"""Nodes of other packs that change the inside of a model, on a real server: the image of stock ComfyUI, or a refusal
that names what is wrong; never another image.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from server_graphs import WORKERS, chain, on_ray

from raylight.dev.demo.comfy_replies import PromptFailed
from raylight.dev.demo.comfy_server import ComfyServer
from raylight.dev.demo.graphs import Graph, Sampling, node, stock
from raylight.dev.demo.prompts import random_prompt, write_prompt
from raylight.dev.demo.tiny import write_checkpoint

pytestmark = pytest.mark.slow

JOB = Sampling("wan.safetensors", width=112, height=80, frames=9, steps=2)
PACK = Path(__file__).resolve().parents[1] / "support" / "changing_pack"

SPLIT = [
    "ChunkedFeedForward",
    "Embedding",
    "WeightInPlace",
    "WeightData",
    "WeightReplaced",
    "Loop",
    "InPlaceAttribute",
    "SharedCounter",
    "SharedResult",
    "NoiseInside",
    "TorchSetting",
]
"""Changes with which tokens stay sharded; the others need full tokens."""
REPLICATED = [
    "AttentionForward",
    "AttentionByTorch",
    "AttentionClass",
    "AttentionMean",
    "CrossAttentionMean",
    "RootForward",
    "UsesWeights",
    "OverrideByHead",
    "OverrideByToken",
    "ForwardOrigInWrapper",
    "ClassInWrapper",
    "PartialInWrapper",
    "StateOnModel",
    "StateInClosure",
    "InPlaceClasses",
    "InPlaceForwardOrig",
    "InPlaceForward",
    "InPlaceBlock",
    "ForwardHook",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    work = tmp_path_factory.mktemp("comfyui")
    write_checkpoint(work / "models" / "wan.safetensors", "wan-t2v", heads=3)
    for name in (*SPLIT, *REPLICATED, "ReplacedInPlace"):
        # ComfyUI keeps a model that a loader has loaded, with what a node has changed on it.
        (work / "models" / f"{name}.safetensors").hardlink_to(work / "models" / "wan.safetensors")
    write_prompt(work / "datasets" / "positive", random_prompt(9, 4096, seed=1))
    write_prompt(work / "datasets" / "negative", random_prompt(6, 4096, seed=2))
    shutil.copytree(PACK, work / "packs" / "changing_pack")
    with ComfyServer(
        work,
        model_paths={
            "diffusion_models": work / "models",
            "datasets": work / "datasets",
            "custom_nodes": work / "packs",
        },
    ) as running:
        yield running


def graph(change: str | None, way: str, file: str | None = None) -> Graph:
    """A change after the loader of a file. `way` is stock, drop-in, behind (Parallelize right after the loader) or end
    (Parallelize after the change).
    """
    made = stock(replace(JOB, model=f"{file or 'wan'}.safetensors"))
    changed = {} if change is None else {"change": node(f"Changing{change}")}
    parallel = {"parallel": node("RayParallelizeModel", ray_actors_init=["workers", 0])}
    if way == "stock":
        return chain(made, changed)
    if way == "drop-in":
        return chain(on_ray(made), changed)
    nodes = parallel | changed if way == "behind" else changed | parallel
    return chain(made | {"workers": WORKERS}, nodes)


def latent(server: ComfyServer, change: str | None, way: str, file: str | None = None) -> torch.Tensor:
    history = server.run(graph(change, way, file), timeout=180)
    return load_file(server.output_files(history, "save")[0])["latent_tensor"]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.std()).item()


def log_since(server: ComfyServer, place: int) -> str:
    return server.log.read_text("utf-8", errors="replace")[place:]


@pytest.mark.parametrize("change", [*SPLIT, *REPLICATED])
def test_equals_stock(server: ComfyServer, change: str) -> None:
    expected = latent(server, change, "stock", change)
    began = len(log_since(server, 0))
    for way in ("drop-in", "behind", "end"):
        assert error(latent(server, change, way, change), expected) <= 1e-4, way
    warned = "has put code inside the model that needs all tokens" in log_since(server, began)
    assert warned == (change in REPLICATED)
    assert "ending the workers" not in log_since(server, began)


def test_the_node_is_named(server: ComfyServer) -> None:
    latent(server, "CrossAttentionMean", "drop-in", "CrossAttentionMean")
    assert re.search(
        r"the node Changing: CrossAttentionMean \(at blocks\.0\.cross_attn\) has put code inside", log_since(server, 0)
    )


@pytest.mark.parametrize("way", ["drop-in", "behind", "end"])
def test_rejects_modules_in_another_order(server: ComfyServer, way: str) -> None:
    with pytest.raises(PromptFailed, match=r"blocks\.0 was replaced by another \(WanAttentionBlock\)"):
        server.run(graph("OtherOrderInWrapper", way), timeout=120)


def test_rejects_a_norm_that_looks_at_other_tokens(server: ComfyServer) -> None:
    began = len(log_since(server, 0))
    with pytest.raises(PromptFailed, match=r"changed blocks\.0\.norm1 of the model, which does not work on each"):
        server.run(graph("NormOverTokens", "drop-in"), timeout=120)
    assert "ending the workers" not in log_since(server, began)


def test_nothing_is_left_for_the_next_run(server: ComfyServer) -> None:
    expected = [latent(server, change, "stock") for change in (None, "MeanOnWhatIsThere")]
    for change in ("AttentionMean", "InPlaceBlock", "WeightInPlace", "StateOnModel"):
        assert error(latent(server, change, "drop-in"), expected[0]) > 1e-2
        latent(server, None, "stock")  # after which ComfyUI loads the model again
        for other, of_stock in zip((None, "MeanOnWhatIsThere"), expected, strict=True):
            assert error(latent(server, other, "drop-in"), of_stock) <= 1e-4


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (
            "drop-in",
            r"a node has changed the model ReplacedInPlace\.safetensors itself .*blocks\.0 was replaced by another "
            r"\(Identity\)",
        ),
        ("end", r"blocks\.0\.modulation is missing.*a node has put another part into the model"),
    ],
)
def test_rejects_a_part_that_was_replaced(server: ComfyServer, way: str, message: str) -> None:
    with pytest.raises(PromptFailed, match=message):
        server.run(graph("ReplacedInPlace", way, "ReplacedInPlace"), timeout=120)
    latent(server, None, way)
