"""Graphs with nodes behind the loader of a model, by stock nodes and on workers."""

from __future__ import annotations

import copy
from typing import Any

from raylight.dev.demo.graphs import Graph, initializer, node

WORKERS = initializer(2)


def chain(graph: Graph, nodes: dict[str, dict[str, Any]]) -> Graph:
    """Return a graph with these nodes one after the other between its loader and its sampler."""
    graph, last = copy.deepcopy(graph), "model"
    for name, one in nodes.items():
        graph[name] = {**one, "inputs": one["inputs"] | {"model": [last, 0]}}
        last = name
    graph["sample"]["inputs"]["model"] = [last, 0]
    return graph


def on_ray(graph: Graph, parallelize: bool = False) -> Graph:
    """Return a graph with the drop-in loader, or with Parallelize Model (Ray) right behind its own loader."""
    graph = copy.deepcopy(graph) | {"workers": WORKERS}
    if parallelize:
        for one in graph.values():
            one["inputs"] = {
                name: ["parallel", 0] if value == ["model", 0] else value for name, value in one["inputs"].items()
            }
        return graph | {"parallel": node("RayParallelizeModel", model=["model", 0], ray_actors_init=["workers", 0])}
    graph["model"] = node("RayModelLoader", **graph["model"]["inputs"], ray_actors_init=["workers", 0])
    return graph
