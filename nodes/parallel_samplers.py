"""Lists for the samplers of several images: noises, prompts, latents."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from inspect import cleandoc
from typing import Any

import comfy.samplers
from comfy_api.latest import io

from .common import CATEGORY, RayActors, driver

SLOTS = 8


def _list_schema(node_id: str, display_name: str, description: str, kind: Any, name: str, what: str) -> io.Schema:
    return io.Schema(
        node_id=node_id,
        display_name=display_name,
        category=CATEGORY,
        description=description,
        search_aliases=["data parallel list", f"list of {name}s", f"batch {name}", "multi gpu batch"],
        inputs=[
            kind.Input(f"{name}_{slot}", optional=slot > 1, tooltip=f"{what} {slot}.") for slot in range(1, SLOTS + 1)
        ],
        outputs=[
            kind.Output(display_name=f"{name}_list", is_output_list=True, tooltip="What is connected, as a list.")
        ],
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
        return _list_schema(
            "DPConditioningList",
            "DP Conditioning List",
            cleandoc(cls.__doc__),
            io.Conditioning,
            "conditioning",
            "Prompt",
        )

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


def _sampler_schema(node_id: str, display_name: str, description: str, aliases: list[str]) -> io.Schema:
    return io.Schema(
        node_id=node_id,
        display_name=display_name,
        category=CATEGORY,
        description=description,
        search_aliases=aliases,
        is_input_list=True,
        inputs=[
            io.Combo.Input(
                "add_noise",
                options=["enable", "disable"],
                tooltip="Add noise before sampling. Disable it to go on from another sampler.",
            ),
            io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Steps of the whole denoising process."),
            io.Float.Input(
                "cfg",
                default=8.0,
                min=0.0,
                max=100.0,
                step=0.1,
                round=0.01,
                tooltip="How strongly to follow the prompt. At 1 the negative prompt is not computed.",
            ),
            io.Combo.Input(
                "sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="The algorithm of the sampler."
            ),
            io.Combo.Input(
                "scheduler",
                options=comfy.samplers.KSampler.SCHEDULERS,
                tooltip="How noise is taken away from step to step.",
            ),
            RayActors.Input("ray_actors", tooltip="The model on its workers, from a Ray loader."),
            io.Noise.Input("noise_list", tooltip="One noise for each image, from DP Noise List or any noise node."),
            io.Conditioning.Input("positive", tooltip="What should be in the pictures: one for all, or a list."),
            io.Conditioning.Input("negative", tooltip="What should not be in the pictures: one for all, or a list."),
            io.Latent.Input("latent_image", tooltip="The latent to denoise: one for all, or a list."),
            io.Int.Input("start_at_step", default=0, min=0, max=10000, tooltip="The first step to do."),
            io.Int.Input("end_at_step", default=10000, min=0, max=10000, tooltip="The step to end before."),
            io.Combo.Input(
                "return_with_leftover_noise",
                options=["disable", "enable"],
                tooltip="Keep the noise that is left at the end step, for a sampler that goes on.",
            ),
            io.Float.Input(
                "denoise",
                default=1.0,
                min=0.0,
                max=1.0,
                step=0.01,
                optional=True,
                tooltip="How much of the denoising to do; below 1 keeps more of the latent.",
            ),
        ],
        outputs=[
            io.Latent.Output(
                display_name="latent", is_output_list=True, tooltip="The denoised latents, one for each noise."
            )
        ],
    )


class DPKSamplerAdvanced(io.ComfyNode):
    """Makes several images or videos, each with its own noise, prompt and latent, on the workers of a Ray model.

    As many at once as there are groups of workers (dp_degree x cfg_degree). Every list that is shorter than that of
    noises goes on with its last item.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _sampler_schema(
            "DPKSamplerAdvanced",
            "DP KSampler (Advanced)",
            cleandoc(cls.__doc__),
            ["data parallel sampler", "multi gpu batch"],
        )

    @classmethod
    def execute(cls, **lists: Sequence[Any]) -> io.NodeOutput:
        return io.NodeOutput(_sample(lists))


class UnifiedParallelSampler(io.ComfyNode):
    """Makes several images or videos with all kinds of parallelism: groups of workers take images, and within each
    group the workers split its tokens.

    Every list that is shorter than that of noises goes on with its last item.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _sampler_schema(
            "UnifiedParallelSampler",
            "Unified Parallel Sampler",
            cleandoc(cls.__doc__),
            ["data parallel sampler", "usp sampler", "multi gpu batch"],
        )

    @classmethod
    def execute(cls, **lists: Sequence[Any]) -> io.NodeOutput:
        return io.NodeOutput(_sample(lists))


def _sample(lists: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """One latent for each noise. Raises ValueError for lists without an item."""
    noises = [noise for noise in lists["noise_list"] if noise is not None]
    if not noises:
        raise ValueError("noise_list is empty: connect a noise node, or DP Noise List with at least one noise")
    runs = []
    for place, noise in enumerate(noises):
        of_run = {name: values[min(place, len(values) - 1)] for name, values in lists.items() if name != "noise_list"}
        runs.append(partial(driver().ksampler, noise=noise, **of_run))
    return driver().at_once(runs)
