"""Nodes that are only in saved workflows: made from ComfyUI's nodes, and marked as deprecated."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import own_pack
import pytest

import nodes as comfy_nodes

# ComfyUI's node, and what has another name here.
TWINS: dict[str, tuple[str, dict[str, str]]] = {
    "RayModelSamplingSD3": ("ModelSamplingSD3", {"model": "ray_actors"}),
    "RayModelSamplingAuraFlow": ("ModelSamplingAuraFlow", {"model": "ray_actors"}),
    "RayModelSamplingFlux": ("ModelSamplingFlux", {"model": "ray_actors"}),
    "RayBasicScheduler": ("BasicScheduler", {"model": "ray_actors"}),
    "RayBetaSamplingScheduler": ("BetaSamplingScheduler", {"model": "ray_actors"}),
    "RayBasicGuider": ("BasicGuider", {"model": "ray_actors"}),
    "RayCFGGuider": ("CFGGuider", {"model": "ray_actors"}),
    "RayDualCFGGuider": ("DualCFGGuider", {"model": "ray_actors"}),
    "RayTorchCompileModel": ("TorchCompileModel", {"model": "ray_actors"}),
    "RayControlNetLoader": ("ControlNetLoader", {}),
    "RayControlNetApply": ("ControlNetApplyAdvanced", {"control_net": "reference"}),
    "RayVAELoader": ("VAELoader", {}),
}
LINKS = {"MODEL": "RAY_ACTORS", "GUIDER": "RAY_GUIDER", "CONTROL_NET": "RAY_CONTROL_NET", "VAE": "RAY_VAE"}
INPUTS = {
    "RayGGUFLoader": ["unet_name", "dequant_dtype", "patch_dtype", "ray_actors_init", "lora"],
    "DPNoiseListSeeds": [f"seed_{slot}" for slot in range(1, 9)],
    "XFuserSamplerCustomAdvancedSeed": ["add_noise", "noise_seed", "guider", "sampler", "sigmas", "latent_image"],
    "RayVAEDecodeDistributed": [
        "ray_actors",
        "samples",
        "vae_name",
        "tile_size",
        "overlap",
        "temporal_size",
        "temporal_overlap",
    ],
}


@pytest.fixture(scope="module")
def pack() -> dict[str, Any]:
    return own_pack.load_beside_stock_nodes()


def inputs_of(node: Any) -> dict[str, Any]:
    declared = node.INPUT_TYPES()
    return declared.get("required", {}) | declared.get("optional", {})


def options_of(spec: Any) -> dict[str, Any]:
    """Options but for what is said about them; a combo's choices have two forms."""
    found = {name: value for name, value in (spec[1] if len(spec) > 1 else {}).items() if name != "tooltip"}
    return found | ({"options": spec[0]} if isinstance(spec[0], list) else {})


@pytest.mark.smoke
@pytest.mark.parametrize("node_id", TWINS)
def test_inputs_and_outputs_are_those_of_comfyui(pack: dict[str, Any], node_id: str) -> None:
    stock, names = pack[TWINS[node_id][0]], TWINS[node_id][1]
    ours, theirs = inputs_of(pack[node_id]), inputs_of(stock)
    if node_id == "RayControlNetLoader":
        assert ours.pop("ray_actors")[0] == "RAY_ACTORS"
    assert list(ours) == [names.get(name, name) for name in theirs]
    for spec, other in zip(ours.values(), theirs.values(), strict=True):
        kind = "COMBO" if isinstance(other[0], list) else other[0]
        assert spec[0] == LINKS.get(kind, kind)
        if other[0] != "MODEL":
            assert options_of(spec) == options_of(other)
    assert list(pack[node_id].RETURN_TYPES) == [LINKS.get(kind, kind) for kind in stock.RETURN_TYPES]


@pytest.mark.parametrize("node_id", [*TWINS, *INPUTS])
def test_is_deprecated_and_says_what_to_use(pack: dict[str, Any], node_id: str) -> None:
    schema = pack[node_id].GET_SCHEMA()
    assert schema.is_deprecated and schema.category == "Raylight"
    assert schema.description.startswith("For saved workflows") and "In new" in schema.description


@pytest.mark.parametrize("node_id", INPUTS)
def test_ids_and_input_order(pack: dict[str, Any], node_id: str) -> None:
    assert list(inputs_of(pack[node_id])) == INPUTS[node_id]


def test_without_the_node_of_comfyui(pack: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(comfy_nodes.NODE_CLASS_MAPPINGS, "BasicScheduler")
    monkeypatch.delitem(comfy_nodes.NODE_CLASS_MAPPINGS, "RayBasicScheduler")
    loaded = own_pack.load()
    assert "RayBasicScheduler" not in loaded and "RayCFGGuider" in loaded


def test_rejects_gguf_dtypes(pack: dict[str, Any]) -> None:
    for change in ({"dequant_dtype": "float32"}, {"patch_dtype": "float16"}):
        inputs = {"unet_name": "a.gguf", "dequant_dtype": "default", "patch_dtype": "default"} | change
        with pytest.raises(ValueError, match="the workers compute with the default only. Choose default"):
            pack["RayGGUFLoader"].execute(**inputs)


def test_seeds_are_those_of_noise_nodes(pack: dict[str, Any]) -> None:
    (noises,) = pack["DPNoiseListSeeds"].execute(seed_2=5, seed_1=4).result
    assert [noise.seed for noise in noises] == [4, 5]


@pytest.mark.parametrize("node_id", ["RayInitializer", "RayInitializerAdvanced"])
def test_missing_inputs_of_an_initializer_have_their_defaults(pack: dict[str, Any], node_id: str) -> None:
    node = pack[node_id]
    defaults = {name: spec[1]["default"] for name, spec in inputs_of(node).items()}
    some = {"GPU": 2, "ulysses_degree": 2}
    results = [asyncio.run(node.execute(**inputs)).result for inputs in (some, defaults | some)]
    assert results[0] == results[1]
    assert not node.INPUT_TYPES().get("required"), "or ComfyUI would not run a prompt that lacks one"


@pytest.fixture
def handler(pack: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What ComfyUI's server calls with each prompt."""
    handlers: list[Any] = []
    instance = SimpleNamespace(add_on_prompt_handler=handlers.append)
    module = SimpleNamespace(PromptServer=SimpleNamespace(instance=instance))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "server", module)
        own_pack.load()
    yield handlers[-1]


def test_kernel_that_landed_at_a_switch(handler: Any) -> None:
    inputs = {"GPU": 2, "FSDP": "TORCH_FLASH", "XFuser_attention": "auto", "dp_degree": False}
    landed = {"class_type": "RayInitializer", "inputs": inputs}
    handler({"prompt": {"1": landed}})
    assert landed["inputs"] == {"GPU": 2, "XFuser_attention": "TORCH_FLASH", "dp_degree": False}
    right = {"class_type": "RayInitializer", "inputs": {"FSDP": True, "XFuser_attention": "TORCH", "GPU": ["2", 0]}}
    handler({"prompt": {"1": right}})
    assert right["inputs"] == {"FSDP": True, "XFuser_attention": "TORCH", "GPU": ["2", 0]}


def test_older_forms_in_prompts(handler: Any) -> None:
    prompt = {
        "1": {"class_type": "XFuserSamplerCustomAdvanced", "inputs": {"guider": ["5", 0], "noise_seed": 42}},
        "2": {"class_type": "DPNoiseList", "inputs": {"noise_1": 4, "noise_2": 9}},
        "3": {"class_type": "XFuserSamplerCustomAdvanced", "inputs": {"ray_actors": ["5", 0], "noise": ["6", 0]}},
        "4": {"class_type": "DPNoiseList", "inputs": {"noise_1": ["6", 0]}},
    }
    handler({"prompt": prompt})
    assert prompt["1"]["class_type"] == "XFuserSamplerCustomAdvancedSeed"
    assert prompt["1"]["inputs"] == {"guider": ["5", 0], "noise_seed": 42, "add_noise": True}
    assert prompt["2"] == {"class_type": "DPNoiseListSeeds", "inputs": {"seed_1": 4, "seed_2": 9}}
    assert [prompt[number]["class_type"] for number in "34"] == ["XFuserSamplerCustomAdvanced", "DPNoiseList"]


@pytest.mark.parametrize("data", [{}, {"prompt": None}, {"prompt": {"1": None, "2": {"inputs": 3}}}])
def test_other_data_stays(handler: Any, data: dict[str, Any]) -> None:
    assert handler(dict(data)) == data
