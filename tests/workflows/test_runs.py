"""Templates as prompts of ComfyUI's frontend: all are valid, and some, run with small models, equal stock nodes."""

from __future__ import annotations

import asyncio
import copy
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import execution
import folder_paths
import own_pack
import pytest
from newest import of_the_newest

from raylight.dev.demo.comfy_server import ComfyServer
from raylight.dev.demo.graphs import Graph
from raylight.dev.workflows.notes import FOLDERS
from raylight.dev.workflows.table import TEMPLATES
from raylight.dev.workflows.template import Template

ROOT = Path(__file__).resolve().parents[2]
OFFICIAL = ROOT / "tests" / "templates"
sys.path.append(str(OFFICIAL))

import chromium
import official
from compared import ENCODED, compare, hold_together, run
from files import asked, write_media, write_models
from rewrite import probed, shrunk

pytestmark = [of_the_newest, pytest.mark.slow, pytest.mark.timeout(900)]

# One of each kind that is quick; ComfyUI takes Z-Image, Chroma and Qwen-Image only at widths that take minutes.
DEFAULT = "wan2.1-t2v-14b-usp flux-dev-dropin flux-dev-dp flux-controlnet-usp ltx-2-19b-usp minimax-h3-usp"
# Any others, or "all".
NAMES = os.environ.get("RAYLIGHT_TEST_WORKFLOWS", DEFAULT).split()
if NAMES == ["all"]:
    NAMES = [template.name for template in TEMPLATES]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    if chromium.find() is None:
        pytest.skip("ComfyUI's frontend needs a browser: install Chromium, or name one in " + chromium.VARIABLE)
    work = tmp_path_factory.mktemp("workflows")
    paths = {folder: work / "models" / folder for folder in FOLDERS}
    for path in paths.values():
        path.mkdir(parents=True)
    with ComfyServer(
        work,
        model_paths=paths | {"custom_nodes": OFFICIAL / "packs"},
        extra_args=["--cpu", "--force-fp32", "--fp32-vae", "--fp32-text-enc"],
    ) as running:
        yield running
    shutil.rmtree(work / "models")  # gigabytes


@pytest.fixture(scope="module")
def prompts(server: ComfyServer) -> dict[str, Graph]:
    """Convert all templates at once: a page that shows one redraws it constantly, which takes a core from the runs."""
    with chromium.Page(chromium.find()) as page:
        frontend = official.Frontend(server, page)
        return {template.name: frontend.prompt(opened(template)) for template in TEMPLATES}


def opened(template: Template) -> dict[str, Any]:
    """Return a template with its nodes on, and a file in those that wait for one.

    A video of a face stays off: its encoder takes minutes here, and the zoo compares it.
    """
    content = template.to_json()
    for node in content["nodes"]:
        if not node.get("title", "").startswith("Face"):
            node["mode"] = 0
        if node["type"] == "LoadVideo":
            node["widgets_values"][0] = f"video-{node['id']}.mp4"
    return content


@pytest.fixture(scope="module")
def definitions() -> None:
    """Load all nodes into this process, for ComfyUI's own validation."""
    own_pack.load_beside_stock_nodes()


@pytest.mark.usefixtures("definitions")
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_prompt_is_valid(
    template: Template, prompts: dict[str, Graph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = {node: {**entry} for node, entry in prompts[template.name].items()}
    nodes = opened(template)["nodes"]
    assert len(prompt) == sum(node["type"] != "MarkdownNote" and node["mode"] == 0 for node in nodes)
    write_media(prompt, tmp_path / "input")
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    for folder in FOLDERS:
        paths, extensions = folder_paths.folder_names_and_paths[folder]
        (tmp_path / folder).mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, folder, ([str(tmp_path / folder), *paths], extensions))
    for item in asked(prompt):
        (tmp_path / item.folder / item.name).touch()
    valid, error, _, node_errors = asyncio.run(execution.validate_prompt("template", prompt, None))
    assert valid, (error, node_errors)


@pytest.mark.parametrize("name", NAMES)
def test_equals_stock_nodes(
    name: str, server: ComfyServer, prompts: dict[str, Graph], report_parity: Callable[[str], None]
) -> None:
    description = server.object_info()
    ours = small(shrunk(prompts[name], description))
    write_models(ours, server.work_dir / "models")
    write_media(ours, server.directory("input"))
    try:
        expected = run(server, probed(as_stock(ours), description, f"{name}-stock"))
        server.free()
        actual = run(server, probed(batched(ours), description, f"{name}-ray"))
    finally:
        server.free()
    # The sampler's latent has a probe in the stock graph only, since a Ray sampler takes no MODEL.
    expected = [(node, value) for node, value in expected if node in dict(actual)]
    assert any(node.startswith(ENCODED) for node, _ in actual)
    hold_together(actual)
    both = zip(actual, expected, strict=True)
    report_parity(f"{name:40} " + "  ".join(compare(kind, a, e) for (kind, a), (_, e) in both))


def small(graph: Graph) -> Graph:
    """Return the prompt without a node that makes small pictures large."""
    for entry in graph.values():
        if entry["class_type"] == "FluxKontextImageScale":
            size = {"upscale_method": "lanczos", "width": 96, "height": 64, "crop": "disabled"}
            entry.update(class_type="ImageScale", inputs=entry["inputs"] | size)
    return graph


def as_stock(graph: Graph) -> Graph:
    """Return the same prompt with ComfyUI's own nodes."""
    found: Graph = {}
    same: dict[tuple[str, int], Any] = {}  # what nodes return as they get it
    for node, entry in graph.items():
        kind, inputs = entry["class_type"], dict(entry["inputs"])
        if kind in ("RayInitializer", "RayLoraLoader", "DPNoiseList", "DPConditioningList"):
            continue
        if kind in ("RayParallelizeModel", "RayParallelizeVAE"):
            same[node, 0] = inputs["model" if kind == "RayParallelizeModel" else "vae"]
            continue
        if kind == "DPKSamplerAdvanced":
            found |= one_by_one(graph, node)
            continue
        if kind in ("RayUNETLoader", "RayModelLoader"):
            found |= with_loras(graph, node)
            continue
        if kind == "RayVAELoaderAsVAE":
            kind, inputs = "VAELoader", {"vae_name": inputs["vae_name"]}
        elif kind == "XFuserKSamplerAdvanced":
            kind = "KSamplerAdvanced"
            inputs["model"] = inputs.pop("ray_actors")
            assert inputs.pop("denoise") == 1
        assert not kind.startswith(("Ray", "XFuser", "DP")), f"no stock node is known here for {kind}"
        found[node] = {"class_type": kind, "inputs": inputs}
    for entry in found.values():
        for key, value in entry["inputs"].items():
            if isinstance(value, list):
                entry["inputs"][key] = same.get(tuple(value), value)
    return found


def with_loras(graph: Graph, node: str) -> Graph:
    """Return a loader and its chain of LoRAs, the last one under the node's own name."""
    inputs = graph[node]["inputs"]
    found: Graph = {}
    chain = inputs.get("lora")
    while chain is not None:
        lora, before = graph[chain[0]]["inputs"], f"{node}-before"
        settings = {name: lora[name] for name in ("lora_name", "strength_model")}
        found[node] = {"class_type": "LoraLoaderModelOnly", "inputs": {**settings, "model": [before, 0]}}
        node, chain = before, lora.get("prev_ray_lora")
    file = {name: inputs[name] for name in ("unet_name", "weight_dtype")}
    return found | {node: {"class_type": "UNETLoader", "inputs": file}}


def one_by_one(graph: Graph, node: str) -> Graph:
    """Return a sampler for each noise of a list, and a batch of their latents under the node's own name."""
    inputs = dict(graph[node]["inputs"])
    noises, prompts = (graph[inputs.pop(name)[0]]["inputs"] for name in ("noise_list", "positive"))
    inputs["model"] = inputs.pop("ray_actors")
    assert inputs.pop("denoise") == 1
    found: Graph = {}
    for number, (noise, prompt) in enumerate(zip(noises.values(), prompts.values(), strict=True)):
        seed = graph[noise[0]]["inputs"]["noise_seed"]
        found[f"{node}-{number}"] = {
            "class_type": "KSamplerAdvanced",
            "inputs": {**inputs, "positive": prompt, "noise_seed": seed},
        }
    before = f"{node}-0"
    for number in range(1, len(noises)):
        batch = node if number == len(noises) - 1 else f"{node}-{number}-batch"
        found[batch] = {
            "class_type": "LatentBatch",
            "inputs": {"samples1": [before, 0], "samples2": [f"{node}-{number}", 0]},
        }
        before = batch
    return found


def batched(graph: Graph) -> Graph:
    """Return the prompt with each list of latents as one batch, which a probe can keep."""
    graph = copy.deepcopy(graph)
    for node, entry in [*graph.items()]:
        if entry["class_type"] == "DPKSamplerAdvanced":
            for other in graph.values():
                for key, value in other["inputs"].items():
                    if value == [node, 0]:
                        other["inputs"][key] = [f"{node}-batch", 0]
            graph[f"{node}-batch"] = {
                "class_type": "RebatchLatents",
                "inputs": {"latents": [node, 0], "batch_size": len(graph[entry["inputs"]["noise_list"][0]]["inputs"])},
            }
    return graph
