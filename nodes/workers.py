"""Raylight Status: the workers, their memory and the ways between them, as text."""

from __future__ import annotations

import math
from inspect import cleandoc
from typing import Any

from comfy_api.latest import io, ui

from .common import CATEGORY, RayActors, driver


class RaylightStatus(io.ComfyNode):
    """Shows the GPUs, the workers that run now, what each holds in memory, and how fast data goes between them.

    Starts no workers. Connect anything to it that should come before, such as the result of a sampler.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RaylightStatus",
            display_name="Raylight Status",
            category=CATEGORY,
            description=cleandoc(cls.__doc__),
            search_aliases=["ray status", "multi gpu status", "gpu memory", "bandwidth"],
            inputs=[
                io.AnyType.Input(
                    "after", optional=True, tooltip="Anything: the status is that of the moment when this is there."
                )
            ],
            outputs=[io.String.Output(display_name="status", tooltip="The same text.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return math.nan  # equal to nothing: the node shows what is, each time

    @classmethod
    def execute(cls, after: Any = None) -> io.NodeOutput:
        text = driver().overview()
        return io.NodeOutput(text, ui=ui.PreviewText(text))


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
                io.Combo.Input(
                    "kill_mode",
                    options=[WORKERS, CLUSTER],
                    default=WORKERS,
                    tooltip="The workers, or these and Ray. A cluster that runs elsewhere is only left.",
                ),
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
