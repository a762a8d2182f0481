"""The 17 public Raylight workflows, in their saved forms: opened in ComfyUI's frontend, and run as it sends them."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from newest import of_the_newest
from safetensors.torch import load_file

from raylight.dev.demo.comfy_server import ComfyServer
from raylight.dev.demo.graphs import Graph

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE)]

import chromium
import public_files
import public_forms as forms
from browser_user import User

pytestmark = [of_the_newest, pytest.mark.slow, pytest.mark.timeout(900)]

PATIENCE = 300.0
# ComfyUI's nodes by the ids of those that are made from them.
STOCK = {
    "RayUNETLoader": "UNETLoader",
    "RayGGUFLoader": "UnetLoaderGGUF",
    "RayModelSamplingSD3": "ModelSamplingSD3",
    "RayModelSamplingAuraFlow": "ModelSamplingAuraFlow",
    "RayBasicScheduler": "BasicScheduler",
    "RayBetaSamplingScheduler": "BetaSamplingScheduler",
    "RayCFGGuider": "CFGGuider",
    "RayControlNetLoader": "ControlNetLoader",
    "RayControlNetApply": "ControlNetApplyAdvanced",
    "RayVAELoader": "VAELoader",
    "XFuserKSamplerAdvanced": "KSamplerAdvanced",
    "XFuserSamplerCustom": "SamplerCustom",
    "XFuserSamplerCustomAdvancedSeed": "SamplerCustomAdvanced",
    "DPKSamplerAdvanced": "KSamplerAdvanced",
}
NAMES = {"ray_actors": "model", "reference": "control_net"}
ONLY_OURS = {"ray_actors_init", "lora", "noise_list", "dequant_dtype", "patch_dtype"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    if chromium.find() is None:
        pytest.skip("ComfyUI's frontend needs a browser: install Chromium, or name one in " + chromium.VARIABLE)
    work = tmp_path_factory.mktemp("public")
    arguments = ["--cpu", "--force-fp32", "--fp32-vae"]
    with ComfyServer(work, model_paths=public_files.write_all(work), extra_args=arguments) as running:
        yield running


@pytest.fixture(scope="module")
def user(server: ComfyServer, request: pytest.FixtureRequest) -> Iterator[User]:
    with chromium.Page(chromium.find()) as page:
        someone = User(page, request.config.getoption("--screenshots"))
        someone.open(f"http://127.0.0.1:{server.port}/")
        yield someone


def sent(user: User) -> Graph:
    """Return the prompt that the frontend would send now."""
    graph = user.page.evaluate("(async () => (await window.app.graphToPrompt()).output)()")
    return {node: {"class_type": entry["class_type"], "inputs": entry["inputs"]} for node, entry in graph.items()}


def as_stock(graph: Graph, seed: str = "") -> Graph:
    """Return the same prompt with ComfyUI's own nodes. A list of seeds has `seed` alone."""
    found: Graph = {}
    for number, entry in graph.items():
        kind, inputs = entry["class_type"], dict(entry["inputs"])
        if kind in ("RayInitializer", "DPNoiseListSeeds"):
            continue
        if kind == "DPKSamplerAdvanced":
            inputs["noise_seed"] = graph[inputs["noise_list"][0]]["inputs"][seed]
        if kind == "XFuserSamplerCustomAdvancedSeed":
            noise = {"noise_seed": inputs.pop("noise_seed")}
            found[f"{number}n"] = {"class_type": "RandomNoise", "inputs": noise}
            inputs["noise"] = [f"{number}n", 0]
            assert inputs.pop("add_noise") is True
        if kind in ("XFuserKSamplerAdvanced", "DPKSamplerAdvanced"):
            assert inputs.pop("denoise") == 1
        if kind == "RayControlNetLoader":
            del inputs["ray_actors"]
        kept = {NAMES.get(name, name): value for name, value in inputs.items() if name not in ONLY_OURS}
        found[number] = {"class_type": STOCK.get(kind, kind), "inputs": kept}
        assert not found[number]["class_type"].startswith(("Ray", "XFuser", "DP")), kind
    for entry in found.values():  # the model that the older sampler gives is the one of its guider
        for name, value in entry["inputs"].items():
            if name == "model" and found[value[0]]["class_type"] == "SamplerCustomAdvanced":
                guider = found[value[0]]["inputs"]["guider"][0]
                entry["inputs"][name] = found[guider]["inputs"]["model"]
    return found


def latents(server: ComfyServer, graph: Graph) -> list[torch.Tensor]:
    (number,) = (number for number, entry in graph.items() if entry["class_type"] == "SaveLatent")
    files = server.output_files(server.run(graph, timeout=PATIENCE), number)
    return [load_file(file)["latent_tensor"] for file in files]


@pytest.mark.parametrize("name", forms.FORMS)
def test_opens_and_equals_stock(
    name: str, user: User, server: ComfyServer, report_parity: Callable[[str], None]
) -> None:
    saved = forms.FORMS[name]().to_json()
    user.load(saved, name)
    user.look(f"public-{name}")
    assert user.problems() == []
    assert user.page.evaluate("window.app.graph.links.size") == len(saved["links"])
    ours = sent(user)
    for entry in ours.values():
        if entry["class_type"] == "RayInitializer":
            assert forms.MEANING[name].items() <= entry["inputs"].items()
    actual = latents(server, ours)
    seeds = [f"seed_{slot}" for slot in range(1, forms.SEEDS + 1)] if name == "FluxDev_Data_Parallel" else [""]
    assert len(actual) == len(seeds)
    for place in {0, len(seeds) - 1}:
        (expected,) = latents(server, as_stock(copy.deepcopy(ours), seeds[place]))
        error = ((actual[place] - expected).abs().max() / expected.std()).item()
        report_parity(f"{name:40} {error:.1e}")
        assert error <= 1e-4


def test_values_of_saved_names(user: User) -> None:
    """A frontend that saves an input for each widget tells by their names where values belong."""
    saved = forms.FORMS["Qwen_2512_Fun_ControlNet"]().to_json()
    (one,) = (node for node in saved["nodes"] if node["type"] == "RayInitializer")
    names = "ray_cluster_address ray_cluster_namespace GPU ulysses_degree ring_degree cfg_degree dp_degree sync_ulysses"
    names += " FSDP FSDP_CPU_OFFLOAD XFuser_attention skip_comm_test use_mmap"
    one["inputs"] = [{"name": name, "type": "*", "widget": {"name": name}, "link": None} for name in [*names.split()]]
    user.load(saved, "names")
    values = values_of(user, "RayInitializer")
    assert values["FSDP"] is True and values["clear_vram_after_sampling"] is False
    assert values["XFuser_attention"] == "TORCH_FLASH" and user.problems() == []


def test_workflow_that_was_opened_wrongly_and_saved(user: User) -> None:
    saved = forms.FORMS["FluxDev"]().to_json()
    (one,) = (node for node in saved["nodes"] if node["type"] == "RayInitializer")
    one["widgets_values"] = [*forms.TEN, False, "auto", False, False]
    user.load(saved, "again")
    assert forms.MEANING["FluxDev"].items() <= values_of(user, "RayInitializer").items()


def test_unknown_values_become_defaults_and_are_told(user: User) -> None:
    user.load(forms.FORMS["FluxDev_Data_Parallel"]().to_json(), "unknown")
    values = values_of(user, "DPKSamplerAdvanced")
    assert values["add_noise"] == "enable" and values["steps"] == 20 and values["denoise"] == 1
    user.find(".p-toast-message-warn")
    assert [values_of(user, "DPNoiseListSeeds")[f"seed_{slot}"] for slot in (1, 8)] == [0, 7]


def test_forms_of_today_stay(user: User) -> None:
    to = forms.Saved()
    workers = to.add("RayInitializer", "RAY_ACTORS_INIT", forms.FOURTEEN)
    model = to.add("RayUNETLoader", "RAY_ACTORS", [forms.FLUX, "default"], ray_actors_init=workers)
    noise = to.add("RandomNoise", "NOISE", [3, "fixed"])
    to.add("DPNoiseList", "NOISE", [], noise_1=noise)
    to.add("XFuserSamplerCustomAdvanced", "LATENT RAY_ACTORS", [], ray_actors=model, noise=noise)
    user.load(to.to_json(), "today")
    types = user.page.evaluate("window.app.graph.nodes.map((node) => node.type)")
    assert types == [node["type"] for node in to.nodes]
    assert list(values_of(user, "RayInitializer").values())[: len(forms.FOURTEEN)] == forms.FOURTEEN


def values_of(user: User, kind: str) -> dict[str, Any]:
    return user.page.evaluate(f"""Object.fromEntries(window.app.graph.nodes.find(
        (node) => node.type === {json.dumps(kind)}).widgets.map((widget) => [widget.name, widget.value]))""")
