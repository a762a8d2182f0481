"""Raylight Status: the workers, their memory and the ways between them, as text."""

from __future__ import annotations

import math
from inspect import cleandoc
from typing import Any

from comfy_api.latest import io, ui

from .engine import driver
from .types import CATEGORY


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
            inputs=[io.AnyType.Input("after", optional=True, tooltip="Anything: the status is that of the moment when "
                                                                     "this is there.")],
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
