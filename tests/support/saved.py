"""Workflows as older versions of these nodes have saved them: values of widgets by their place."""

from __future__ import annotations

from typing import Any

MODEL, LORA, CLIP = "old-model.safetensors", "old-lora.safetensors", "old-clip.safetensors"
_INITIALIZERS = {
    "RayInitializer": ["local", "default", 2, 2, 1, 1, 1, True, False, False, False, "TORCH_FLASH", False, True],
    "RayInitializerAdvanced": [
        "local",
        "default",
        4,
        "",
        2,
        1,
        False,
        2,
        1,
        False,
        True,
        False,
        "TORCH",
        True,
        False,
        2.0,
        "None",
        "127.0.0.1:29500",
    ],
}
# What these values are, by the names that NODES of the time had; what is not named here has no effect any more.
MEANING = {
    "RayInitializer": {
        "GPU": 2,
        "ulysses_degree": 2,
        "ring_degree": 1,
        "cfg_degree": 1,
        "dp_degree": 1,
        "FSDP": False,
        "FSDP_CPU_OFFLOAD": False,
        "XFuser_attention": "TORCH_FLASH",
    },
    "RayInitializerAdvanced": {
        "GPU": 4,
        "GPU_SELECT": "",
        "ulysses_degree": 2,
        "ring_degree": 1,
        "cfg_degree": 2,
        "dp_degree": 1,
        "FSDP": True,
        "FSDP_CPU_OFFLOAD": False,
        "XFuser_attention": "TORCH",
        "ray_object_store_gb": 2.0,
    },
}


def workflow(initializer: str) -> dict[str, Any]:
    """Text to video on Ray nodes with this initializer."""
    nodes = [
        _node(1, initializer, [], [("ray_actors_init", "RAY_ACTORS_INIT", [1])], _INITIALIZERS[initializer]),
        _node(2, "RayLoraLoader", [("prev_ray_lora", "RAY_LORA", None)], [("ray_lora", "RAY_LORA", [2])], [LORA, 0.8]),
        _node(
            3,
            "RayUNETLoader",
            [("ray_actors_init", "RAY_ACTORS_INIT", 1), ("lora", "RAY_LORA", 2)],
            [("ray_actors", "RAY_ACTORS", [3])],
            [MODEL, "default"],
        ),
        _node(4, "CLIPLoader", [], [("CLIP", "CLIP", [4])], [CLIP, "wan", "default"]),
        _node(5, "CLIPTextEncode", [("clip", "CLIP", 4)], [("CONDITIONING", "CONDITIONING", [5, 6])], ["a fox"]),
        _node(6, "EmptyHunyuanLatentVideo", [], [("LATENT", "LATENT", [7])], [832, 480, 33, 1]),
        _node(
            7,
            "XFuserKSamplerAdvanced",
            [
                ("ray_actors", "RAY_ACTORS", 3),
                ("positive", "CONDITIONING", 5),
                ("negative", "CONDITIONING", 6),
                ("latent_image", "LATENT", 7),
            ],
            [("LATENT", "LATENT", [8]), ("ray_actors", "RAY_ACTORS", [])],
            ["enable", 7, "fixed", 30, 6.0, "uni_pc", "simple", 0, 10000, "disable", 1.0],
        ),
        _node(8, "SaveLatent", [("samples", "LATENT", 8)], [], ["latents/old"]),
    ]
    links = [
        [1, 1, 0, 3, 0, "RAY_ACTORS_INIT"],
        [2, 2, 0, 3, 1, "RAY_LORA"],
        [3, 3, 0, 7, 0, "RAY_ACTORS"],
        [4, 4, 0, 5, 0, "CLIP"],
        [5, 5, 0, 7, 1, "CONDITIONING"],
        [6, 5, 0, 7, 2, "CONDITIONING"],
        [7, 6, 0, 7, 3, "LATENT"],
        [8, 7, 0, 8, 0, "LATENT"],
    ]
    return {
        "last_node_id": 8,
        "last_link_id": 8,
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _node(number: int, kind: str, inputs: list[Any], outputs: list[Any], values: list[Any]) -> dict[str, Any]:
    return {
        "id": number,
        "type": kind,
        "pos": [400 * (number - 1), 0],
        "size": [350, 400],
        "flags": {},
        "order": number,
        "mode": 0,
        "inputs": [{"name": name, "type": type, "link": link} for name, type, link in inputs],
        "outputs": [{"name": name, "type": type, "links": links} for name, type, links in outputs],
        "properties": {"Node name for S&R": kind},
        "widgets_values": values,
    }
