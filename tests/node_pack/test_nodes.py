"""The nodes as ComfyUI sees them: ids, input order (saved widget values are positional), help, refusals."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import own_pack
import pytest

_EACH = [
    "add_noise",
    "steps",
    "cfg",
    "sampler_name",
    "scheduler",
    "ray_actors",
    "noise_list",
    "positive",
    "negative",
    "latent_image",
    "start_at_step",
    "end_at_step",
    "return_with_leftover_noise",
    "denoise",
]
INPUTS = {
    "RayInitializer": [
        "ray_cluster_address",
        "ray_cluster_namespace",
        "GPU",
        "ulysses_degree",
        "ring_degree",
        "cfg_degree",
        "dp_degree",
        "sync_ulysses",
        "clear_vram_after_sampling",
        "FSDP",
        "FSDP_CPU_OFFLOAD",
        "XFuser_attention",
        "skip_comm_test",
        "use_mmap",
    ],
    "RayInitializerAdvanced": [
        "ray_cluster_address",
        "ray_cluster_namespace",
        "GPU",
        "GPU_SELECT",
        "ulysses_degree",
        "ring_degree",
        "clear_vram_after_sampling",
        "cfg_degree",
        "dp_degree",
        "sync_ulysses",
        "FSDP",
        "FSDP_CPU_OFFLOAD",
        "XFuser_attention",
        "skip_comm_test",
        "use_mmap",
        "ray_object_store_gb",
        "ray_dashboard_address",
        "torch_dist_address",
        "sequence_attention",
        "cuda_graphs",
    ],
    "RayUNETLoader": ["unet_name", "weight_dtype", "ray_actors_init", "lora"],
    "RayModelLoader": ["unet_name", "weight_dtype", "ray_actors_init", "lora"],
    "RayParallelizeModel": ["model", "ray_actors_init"],
    "RayVAELoaderAsVAE": ["vae_name", "ray_actors_init", "ray_actors"],
    "RayParallelizeVAE": ["vae", "ray_actors_init", "ray_actors"],
    "XFuserSamplerCustom": [
        "ray_actors",
        "add_noise",
        "noise_seed",
        "cfg",
        "positive",
        "negative",
        "sampler",
        "sigmas",
        "latent_image",
    ],
    "XFuserSamplerCustomAdvanced": ["ray_actors", "noise", "guider", "sampler", "sigmas", "latent_image"],
    "DPKSamplerAdvanced": _EACH,
    "UnifiedParallelSampler": _EACH,
    "DPNoiseList": [f"noise_{slot}" for slot in range(1, 9)],
    "DPConditioningList": [f"conditioning_{slot}" for slot in range(1, 9)],
    "DPLatentList": [f"latent_{slot}" for slot in range(1, 9)],
    "RayLoraLoader": ["lora_name", "strength_model", "prev_ray_lora"],
    "XFuserKSamplerAdvanced": [
        "add_noise",
        "noise_seed",
        "steps",
        "cfg",
        "sampler_name",
        "scheduler",
        "ray_actors",
        "positive",
        "negative",
        "latent_image",
        "start_at_step",
        "end_at_step",
        "return_with_leftover_noise",
        "denoise",
    ],
}

GOOD: dict[str, Any] = {
    "ray_cluster_address": "local",
    "ray_cluster_namespace": "default",
    "GPU": 2,
    "ulysses_degree": 2,
    "ring_degree": 1,
    "cfg_degree": 1,
    "dp_degree": 1,
    "FSDP": False,
    "FSDP_CPU_OFFLOAD": False,
    "XFuser_attention": "auto",
    "GPU_SELECT": "",
}


@pytest.fixture(scope="module", autouse=True)
def pack() -> dict[str, Any]:
    return own_pack.load()


def declared(node: Any) -> dict[str, tuple]:
    inputs = node.INPUT_TYPES()
    return inputs.get("required", {}) | inputs.get("optional", {})


@pytest.mark.smoke
@pytest.mark.parametrize("node_id", INPUTS)
def test_ids_and_input_order(pack: dict[str, Any], node_id: str) -> None:
    assert list(declared(pack[node_id])) == INPUTS[node_id]


@pytest.mark.parametrize("node_id", INPUTS)
def test_everything_has_help(pack: dict[str, Any], node_id: str) -> None:
    schema = pack[node_id].GET_SCHEMA()
    assert schema.category == "Raylight"
    assert schema.description
    assert [i.id for i in schema.inputs if not i.tooltip] == []
    assert [o.id for o in schema.outputs if not o.tooltip] == []


def executed(initializer: Any, **inputs: Any) -> Any:
    """Return the workers that an initializer describes."""
    return asyncio.run(initializer.execute(**inputs)).result[0]


@pytest.mark.smoke
def test_link_types(pack: dict[str, Any]) -> None:
    assert pack["RayInitializer"].RETURN_TYPES == ["RAY_ACTORS_INIT"]
    assert pack["RayUNETLoader"].RETURN_TYPES == ["RAY_ACTORS"]
    assert pack["XFuserKSamplerAdvanced"].RETURN_TYPES == ["LATENT", "RAY_ACTORS"]


@pytest.mark.parametrize("node_id", ["RayInitializer", "RayInitializerAdvanced"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"GPU": 3},
            "ulysses_degree = 2 x ring_degree = 1 makes 2 workers, but GPU = 3: "
            r"set ulysses_degree to 0 \(automatic\), or ulysses_degree and ring_degree to 3 and 1 or 1 and 3, "
            "or GPU to 2",
        ),
        ({"ring_degree": 2}, "ulysses_degree = 2 x ring_degree = 2 makes 4 workers, but GPU = 2"),
        ({"GPU": -1}, "GPU = -1: at least 1 and at most 64, or 0 for automatic"),
        ({"GPU": 65}, "GPU = 65: at least 1 and at most 64"),
        (
            {"ulysses_degree": 0, "cfg_degree": 3},
            "cfg_degree = 3 makes 3 workers, but GPU = 2: change the degrees so that "
            "their product divides 2, or GPU to 3",
        ),
        ({"ring_degree": 0}, "ring_degree = 0: at least 1"),
        ({"cfg_degree": 2}, "ulysses_degree = 2 x ring_degree = 1 x cfg_degree = 2 makes 4 workers, but GPU = 2"),
        (
            {"dp_degree": 0, "GPU": 3},
            "makes 2 workers, but GPU = 3: change the degrees so that their product divides 3",
        ),
        ({"dp_degree": 2}, "x dp_degree = 2 makes 4 workers, but GPU = 2"),
        ({"FSDP_CPU_OFFLOAD": True}, "switch FSDP on, or FSDP_CPU_OFFLOAD off"),
        ({"XFuser_attention": "SPARSE_SAGE"}, "SPARSE_SAGE needs parameters .* choose one of auto, TORCH"),
        ({"XFuser_attention": "SAGE_FP8"}, "SAGE_FP8: the Python package sageattention is not installed: install"),
    ],
)
def test_rejects(pack: dict[str, Any], node_id: str, change: dict[str, Any], message: str) -> None:
    node, names = pack[node_id], set(INPUTS[node_id])
    known = {k: v for k, v in (GOOD | change).items() if k in names}
    judged = {k: known[k] for k in ("GPU", "ulysses_degree", "ring_degree", "cfg_degree", "dp_degree")}
    if judged.keys() & change.keys():
        assert re.search(message, node.validate_inputs(**judged)), "known before anything runs"
    with pytest.raises(ValueError, match=message):
        executed(node, **known)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0;1", "write the indices of GPUs, such as 0,2"),
        ("zero,one", "write the indices of GPUs, such as 0,2"),
        ("0,0", "names a GPU twice|this machine has no GPU"),
        ("0", "names 1 GPUs|this machine has no GPU"),
    ],
)
def test_rejects_gpu_select(pack: dict[str, Any], text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        executed(pack["RayInitializerAdvanced"], **(GOOD | {"GPU_SELECT": text}))


def test_accepts(pack: dict[str, Any]) -> None:
    node = pack["RayInitializer"]
    degrees = {"ulysses_degree": 2, "ring_degree": 1, "cfg_degree": 1, "dp_degree": 1}
    assert node.validate_inputs(GPU=2, **degrees) is True
    assert node.validate_inputs(GPU=None, **degrees) is True
    assert node.validate_inputs(GPU="two", **degrees) is True, "ComfyUI says that it is no number"
    assert node.validate_inputs(GPU=12, **(degrees | {"cfg_degree": 2, "dp_degree": 0})) is True
    known = {k: v for k, v in GOOD.items() if k in INPUTS["RayInitializer"]}
    assert executed(node, **(known | {"dp_degree": 0})) == executed(node, **known)
    mesh = executed(node, **(known | {"GPU": 12, "cfg_degree": 2, "dp_degree": 0})).config.mesh
    assert (mesh.batch, mesh.ring, mesh.ulysses) == (6, 1, 2)


def test_equal_inputs_give_equal_workers(pack: dict[str, Any]) -> None:
    node = pack["RayInitializer"]
    first, second = (executed(node, **GOOD) for _ in range(2))
    assert first == second
    assert executed(node, **(GOOD | {"GPU": 1, "ulysses_degree": 1})) != first


@pytest.mark.parametrize(
    ("node_id", "name"),
    [
        ("RayUNETLoader", "unet_name"),
        ("RayModelLoader", "unet_name"),
        ("RayLoraLoader", "lora_name"),
        ("RayVAELoaderAsVAE", "vae_name"),
    ],
)
def test_a_linked_file_name_does_not_run_the_node_in_every_prompt(
    pack: dict[str, Any], node_id: str, name: str
) -> None:
    """ComfyUI asks before the name is known, and takes an error for a change."""
    assert pack[node_id].fingerprint_inputs(**{name: None}) == ()
    with pytest.raises(FileNotFoundError):
        pack[node_id].fingerprint_inputs(**{name: "missing.safetensors"})


def test_rejects_missing_model_file(pack: dict[str, Any]) -> None:
    workers = executed(pack["RayInitializer"], **GOOD)
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors is not in .*diffusion_models"):
        pack["RayUNETLoader"].execute("missing.safetensors", "default", workers)
