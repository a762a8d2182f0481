"""Raylight Status and Ray Kill: show the workers, and stop them."""

from __future__ import annotations

import math
from inspect import cleandoc
from typing import Any

from comfy_api.latest import io, ui

from .common import CATEGORY, RayActors, driver

WORKERS, CLUSTER = "Kill Workers Only", "Kill Entire Cluster"


class RaylightStatus(io.ComfyNode):
    """Show the GPUs, the running workers, their memory, and the bandwidth between them.

    Starts no workers. Connect anything that should happen first, such as the result of a sampler.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RaylightStatus",
            display_name="Raylight Status",
            category=CATEGORY,
            description=cleandoc(cls.__doc__),
            search_aliases=["ray status", "multi gpu status", "gpu memory", "bandwidth"],
            inputs=[io.AnyType.Input("after", optional=True, tooltip="Anything that has to be ready first.")],
            outputs=[io.String.Output(display_name="status", tooltip="The same text.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return math.nan  # never equal, so the node runs with every prompt

    @classmethod
    def execute(cls, after: Any = None) -> io.NodeOutput:
        text = driver().overview()
        return io.NodeOutput(text, ui=ui.PreviewText(text))


class RayKill(io.ComfyNode):
    """Stop the workers and free all their memory; "Kill Entire Cluster" also stops the Ray that Raylight started.

    Never needed after an error: failed workers restart by themselves. The next prompt with a Ray loader starts them
    again.
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
                RayActors.Input("ray_actors", tooltip="The model of the workers to stop, from the last sampler."),
                io.Combo.Input(
                    "kill_mode",
                    options=[WORKERS, CLUSTER],
                    default=WORKERS,
                    tooltip="Only the workers, or Ray too. A cluster started elsewhere keeps running.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return math.nan  # never equal, so the node runs with every prompt

    @classmethod
    def execute(cls, ray_actors: Any, kill_mode: str) -> io.NodeOutput:
        driver().end_workers(with_ray=kill_mode == CLUSTER)
        return io.NodeOutput()
