"""Lists for the samplers of several images: noises, prompts, latents."""

from __future__ import annotations

from inspect import cleandoc
from typing import Any

from comfy_api.latest import io

from .types import CATEGORY

SLOTS = 8


def _list_schema(node_id: str, display_name: str, description: str, kind: Any, name: str, what: str) -> io.Schema:
    return io.Schema(
        node_id=node_id,
        display_name=display_name,
        category=CATEGORY,
        description=description,
        search_aliases=["data parallel list", f"list of {name}s", f"batch {name}", "multi gpu batch"],
        inputs=[kind.Input(f"{name}_{slot}", optional=slot > 1, tooltip=f"{what} {slot}.")
                for slot in range(1, SLOTS + 1)],
        outputs=[kind.Output(display_name=f"{name}_list", is_output_list=True,
                             tooltip="What is connected, as a list.")],
    )


def _connected(slots: dict[str, Any]) -> io.NodeOutput:
    in_order = sorted(slots.items(), key=lambda slot: int(slot[0].rpartition("_")[2]))
    return io.NodeOutput([value for _, value in in_order if value is not None])


class DPNoiseList(io.ComfyNode):
    """Puts up to 8 noises together, one for each image of a DP KSampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _list_schema("DPNoiseList", "DP Noise List", cleandoc(cls.__doc__), io.Noise, "noise", "Noise")

    @classmethod
    def execute(cls, **slots: Any) -> io.NodeOutput:
        return _connected(slots)


class DPConditioningList(io.ComfyNode):
    """Puts up to 8 prompts together, one for each image of a DP KSampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _list_schema("DPConditioningList", "DP Conditioning List", cleandoc(cls.__doc__), io.Conditioning,
                       "conditioning", "Prompt")

    @classmethod
    def execute(cls, **slots: Any) -> io.NodeOutput:
        return _connected(slots)


class DPLatentList(io.ComfyNode):
    """Puts up to 8 latents together, one for each image of a DP KSampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _list_schema("DPLatentList", "DP Latent List", cleandoc(cls.__doc__), io.Latent, "latent", "Latent")

    @classmethod
    def execute(cls, **slots: Any) -> io.NodeOutput:
        return _connected(slots)
