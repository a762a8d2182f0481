"""Templates as prompts of ComfyUI's frontend: all are valid, and some, run with small models, equal stock nodes."""

from __future__ import annotations

import asyncio
import os
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
from raylight.dev.workflows.table import TEMPLATES

ROOT = Path(__file__).resolve().parents[2]
OFFICIAL = ROOT / "tests" / "templates"
sys.path.append(str(OFFICIAL))

import chromium
import official
from compared import ENCODED, compare, hold_together, run
from files import asked, write_media, write_models
from rewrite import probed, shrunk

pytestmark = [of_the_newest, pytest.mark.slow, pytest.mark.timeout(900)]

# Any others but flux-controlnet-usp, whose ControlNet no test makes a file for.
NAMES = os.environ.get("RAYLIGHT_TEST_WORKFLOWS", "wan2.1-t2v-14b-usp flux-dev-dropin").split()
FOLDERS = ("diffusion_models", "text_encoders", "vae", "loras", "controlnet")


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


@pytest.fixture(scope="module")
def prompts(server: ComfyServer) -> dict[str, Graph]:
    """Convert all templates at once: a page that shows one redraws it constantly, which takes a core from the runs."""
    with chromium.Page(chromium.find()) as page:
        frontend = official.Frontend(server, page)
        return {template.name: frontend.prompt(template.to_json()) for template in TEMPLATES}


@pytest.fixture(scope="module")
def definitions() -> None:
    """Load all nodes into this process, for ComfyUI's own validation."""
    own_pack.load_beside_stock_nodes()


@pytest.mark.usefixtures("definitions")
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_prompt_is_valid(
    template: Any, prompts: dict[str, Graph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = {node: {**entry} for node, entry in prompts[template.name].items()}
    notes = sum(node["type"] == "MarkdownNote" for node in template.to_json()["nodes"])
    assert len(prompt) == len(template.to_json()["nodes"]) - notes
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
    ours = shrunk(prompts[name], description)
    written = write_models(ours, server.work_dir / "models")
    write_media(ours, server.directory("input"))
    try:
        expected = run(server, probed(as_stock(ours), description, f"{name}-stock"))
        server.free()
        actual = run(server, probed(ours, description, f"{name}-ray"))
    finally:
        server.free()
        for path in written:
            path.unlink()
    # The sampler's latent has a probe in the stock graph only, since a Ray sampler takes no MODEL.
    expected = [(node, value) for node, value in expected if node in dict(actual)]
    assert any(node.startswith(ENCODED) for node, _ in actual)
    hold_together(actual)
    both = zip(actual, expected, strict=True)
    report_parity(f"{name:40} " + "  ".join(compare(kind, a, e) for (kind, a), (_, e) in both))


def as_stock(graph: Graph) -> Graph:
    """Return the same prompt with ComfyUI's own nodes."""
    found = {}
    for node, entry in graph.items():
        kind, inputs = entry["class_type"], dict(entry["inputs"])
        if kind == "RayInitializer":
            continue
        if kind in ("RayUNETLoader", "RayModelLoader"):
            kind = "UNETLoader"
            inputs = {name: inputs[name] for name in ("unet_name", "weight_dtype")}
        elif kind == "RayVAELoaderAsVAE":
            kind, inputs = "VAELoader", {"vae_name": inputs["vae_name"]}
        elif kind == "XFuserKSamplerAdvanced":
            kind = "KSamplerAdvanced"
            inputs["model"] = inputs.pop("ray_actors")
            assert inputs.pop("denoise") == 1
        assert not kind.startswith(("Ray", "XFuser", "DP")), f"no stock node is known here for {kind}"
        found[node] = {"class_type": kind, "inputs": inputs}
    return found
