"""RayKill: ends the workers by hand."""

from __future__ import annotations

import math
from inspect import cleandoc
from typing import Any

from comfy_api.latest import io

from .engine import driver
from .types import CATEGORY, RayActors

WORKERS, CLUSTER = "Kill Workers Only", "Kill Entire Cluster"


class RayKill(io.ComfyNode):
    """Ends the workers, and with "Kill Entire Cluster" also the Ray that Raylight has started.

    Never needed: workers that fail start anew by themselves. It gives all their memory back until the next prompt with
    a Ray loader starts them again.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RayKill",
            display_name="Ray Kill",
            category=CATEGORY,
            description=cleandoc(cls.__doc__),
            search_aliases=["stop workers", "reset ray", "free gpu memory"],
            inputs=[
                RayActors.Input("ray_actors", tooltip="The model whose workers are to end, from the last sampler."),
                io.Combo.Input("kill_mode", options=[WORKERS, CLUSTER], default=WORKERS,
                               tooltip="The workers, or these and Ray. A cluster that runs elsewhere is only left."),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return math.nan  # equal to nothing: the node ends what runs, each time

    @classmethod
    def execute(cls, ray_actors: Any, kill_mode: str) -> io.NodeOutput:
        driver().end_workers(with_ray=kill_mode == CLUSTER)
        return io.NodeOutput()
