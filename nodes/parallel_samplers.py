"""Samplers of several images at once, and lists for their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from inspect import cleandoc
from typing import Any

from comfy_api.latest import io

from .common import CATEGORY, driver, ksampler_inputs

SLOTS = 8


class _List(io.ComfyNode):
    @classmethod
    def _schema(cls, node_id: str, display_name: str, kind: Any, name: str) -> io.Schema:
        return io.Schema(
            node_id=node_id,
            display_name=display_name,
            category=CATEGORY,
            description=cleandoc(cls.__doc__),
            search_aliases=["data parallel list", f"list of {name}s", f"batch {name}", "multi gpu batch"],
            inputs=[
                kind.Input(f"{name}_{slot}", optional=slot > 1, tooltip=f"{name.capitalize()} of image {slot}.")
                for slot in range(1, SLOTS + 1)
            ],
            outputs=[
                kind.Output(
                    display_name=f"{name}_list", is_output_list=True, tooltip="The connected inputs, as a list."
                )
            ],
        )

    @classmethod
    def execute(cls, **slots: Any) -> io.NodeOutput:
        in_order = sorted(slots.items(), key=lambda slot: int(slot[0].rpartition("_")[2]))
        return io.NodeOutput([value for _, value in in_order if value is not None])


class DPNoiseList(_List):
    """Collect up to 8 noises, one for each image of a DP KSampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls._schema("DPNoiseList", "DP Noise List", io.Noise, "noise")


class DPConditioningList(_List):
    """Collect up to 8 prompts, one for each image of a DP KSampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls._schema("DPConditioningList", "DP Conditioning List", io.Conditioning, "conditioning")


class DPLatentList(_List):
    """Collect up to 8 latents, one for each image of a DP KSampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls._schema("DPLatentList", "DP Latent List", io.Latent, "latent")


class _ParallelSampler(io.ComfyNode):
    @classmethod
    def _schema(cls, node_id: str, display_name: str, aliases: list[str]) -> io.Schema:
        noises = io.Noise.Input("noise_list", tooltip="One noise per image, from DP Noise List or any noise node.")
        return io.Schema(
            node_id=node_id,
            display_name=display_name,
            category=CATEGORY,
            description=cleandoc(cls.__doc__),
            search_aliases=aliases,
            is_input_list=True,
            inputs=ksampler_inputs(seed=[], noises=[noises]),
            outputs=[
                io.Latent.Output(
                    display_name="latent", is_output_list=True, tooltip="The denoised latents, one per noise."
                )
            ],
        )

    @classmethod
    def execute(cls, noise_list: Sequence[Any], **lists: Sequence[Any]) -> io.NodeOutput:
        noises = [noise for noise in noise_list if noise is not None]
        if not noises:
            raise ValueError("noise_list is empty: connect a noise node, or DP Noise List with at least one noise")
        api = driver()
        runs = []
        for image, noise in enumerate(noises):
            inputs = {name: values[min(image, len(values) - 1)] for name, values in lists.items()}
            runs.append(partial(api.ksampler, noise=noise, **inputs))
        return io.NodeOutput(api.run_batched(runs))


class DPKSamplerAdvanced(_ParallelSampler):
    """Sample several images or videos at once, each with its own noise, prompt and latent.

    Every group of workers (dp_degree x cfg_degree) takes one. A list shorter than the noises repeats its last item.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls._schema("DPKSamplerAdvanced", "DP KSampler (Advanced)", ["data parallel sampler", "multi gpu batch"])


class UnifiedParallelSampler(_ParallelSampler):
    """Sample several images or videos: groups of workers take images, and each group splits the tokens of its image.

    A list shorter than the noises repeats its last item.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        aliases = ["data parallel sampler", "usp sampler", "multi gpu batch"]
        return cls._schema("UnifiedParallelSampler", "Unified Parallel Sampler", aliases)
