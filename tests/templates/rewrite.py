"""Changes to a template's prompt: the same for both runs, then the loader for one of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

from compared import ENCODED, IMAGE, LATENT

from raylight.dev.demo.graphs import Graph, initializer

SIDE, FRAMES, STEPS, MEGAPIXELS = 96, 9, 4, 0.01
_STEPS = ("steps", "start_at_step", "end_at_step")
_SIDES = ("width", "height")
_PRIMITIVES = ("PrimitiveInt", "INTConstant", "PrimitiveFloat")


def shrunk(graph: Graph, description: Mapping[str, Any]) -> Graph:
    """Return the prompt with small pictures, few frames and few steps, in whichever nodes hold these numbers."""
    graph = copy.deepcopy(graph)
    _scale(
        graph,
        _STEPS,
        lambda value, most: math.ceil(value * STEPS / most) if most > STEPS else value,
        low=1,
        ignored=1000,
    )
    _scale(graph, _SIDES, lambda value, most: max(64, round(value * SIDE / most / 32) * 32), low=64, ignored=16384)
    for entry in graph.values():
        inputs = entry["inputs"]
        if isinstance(inputs.get("length"), (int, list)) and not isinstance(inputs.get("length"), bool):
            inputs["length"] = FRAMES
        if isinstance(inputs.get("megapixels"), (int, float, list)):
            inputs["megapixels"] = max(MEGAPIXELS, _least(description, entry["class_type"], "megapixels"))
        if isinstance(inputs.get("batch_size"), int):
            inputs["batch_size"] = 1
    return graph


def _least(description: Mapping[str, Any], kind: str, key: str) -> float:
    """Return the minimum of a node's input."""
    for group in ("required", "optional"):
        spec = description.get(kind, {}).get("input", {}).get(group, {}).get(key)
        if spec and len(spec) > 1:
            return spec[1].get("min", 0.0)
    return 0.0


def _scale(graph: Graph, names: tuple[str, ...], rule: Any, *, low: int, ignored: int) -> None:
    """Apply a rule to inputs of these names, and to the primitive nodes that feed them."""
    places = {}
    for node, entry in graph.items():
        for key in names:
            value = entry["inputs"].get(key)
            if isinstance(value, int) and not isinstance(value, bool):
                places[node, key] = value
            elif isinstance(value, list):
                places |= {
                    (source, "value"): graph[source]["inputs"]["value"]
                    for source in _upstream(graph, value[0])
                    if graph[source]["class_type"] in _PRIMITIVES
                    and isinstance(graph[source]["inputs"].get("value"), int)
                }
    numbers = [value for value in places.values() if low <= value < ignored]
    for (node, key), value in places.items():
        if low <= value < ignored:
            graph[node]["inputs"][key] = rule(value, max(numbers))


def _upstream(graph: Graph, node: str) -> Iterator[str]:
    seen, open_nodes = set(), [node]
    while open_nodes:
        node = open_nodes.pop()
        if node in seen or node not in graph:
            continue
        seen.add(node)
        yield node
        # Only through switches and sums; beyond them, numbers mean other things.
        if any(word in graph[node]["class_type"] for word in ("Switch", "Primitive", "Math", "Reroute")):
            open_nodes += [value[0] for value in graph[node]["inputs"].values() if isinstance(value, list) and value]


def probed(graph: Graph, description: Mapping[str, Any], prefix: str) -> Graph:
    """Add a probe to every latent that a sampler returns, every decoded picture, and every input of a node that makes
    files or videos of pictures.
    """
    graph = copy.deepcopy(graph)
    for node, entry in list(graph.items()):
        info = description.get(entry["class_type"], {})
        inputs, outputs = _inputs(info), info.get("output", ())
        name = f"{prefix}-{node.replace(':', '_')}"
        if "LATENT" in outputs and "LATENT" in inputs.values() and {"MODEL", "GUIDER"} & {*inputs.values()}:
            graph[f"{LATENT} {node}"] = {
                "class_type": "TemplateProbe",
                "inputs": {"samples": [node, outputs.index("LATENT")], "name": name},
            }
        elif "IMAGE" in outputs and {"LATENT", "VAE"} <= {*inputs.values()}:
            graph[f"{IMAGE} {node}"] = {
                "class_type": "TemplateImageProbe",
                "inputs": {"images": [node, outputs.index("IMAGE")], "name": name},
            }
        elif info.get("output_node") or "VIDEO" in outputs:
            for key, value in entry["inputs"].items():
                if inputs.get(key) == "IMAGE" and isinstance(value, list):
                    graph[f"{ENCODED} {node} {key}"] = {
                        "class_type": "TemplateImageProbe",
                        "inputs": {"images": value, "name": f"{name}-{key}"},
                    }
    return graph


def _inputs(info: Mapping[str, Any]) -> dict[str, str]:
    """Return a node's inputs and their types, without the choices of combos."""
    return {
        key: spec[0]
        for group in ("required", "optional")
        for key, spec in info.get("input", {}).get(group, {}).items()
        if isinstance(spec, (list, tuple)) and isinstance(spec[0], str)
    }


def on_workers(graph: Graph, workers: int = 2) -> Graph:
    """Return the prompt with only its loaders of diffusion models replaced."""
    graph = copy.deepcopy(graph)
    graph["ray workers"] = initializer(workers, XFuser_attention="TORCH")
    for node, entry in list(graph.items()):
        if entry["class_type"] == "UNETLoader":
            entry["class_type"] = "RayModelLoader"
            entry["inputs"]["ray_actors_init"] = ["ray workers", 0]
        elif entry["class_type"] == "CheckpointLoaderSimple":
            _parallelize(graph, node)
    return graph


def _parallelize(graph: Graph, loader: str) -> None:
    """Put a node after the model output of a checkpoint loader, whose text encoder and VAE stay."""
    behind = f"{loader} on workers"
    for entry in graph.values():
        for key, value in entry["inputs"].items():
            if value == [loader, 0]:
                entry["inputs"][key] = [behind, 0]
    graph[behind] = {
        "class_type": "RayParallelizeModel",
        "inputs": {"model": [loader, 0], "ray_actors_init": ["ray workers", 0]},
    }
