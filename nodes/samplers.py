"""ComfyUI's samplers, run by the workers."""

from __future__ import annotations

from inspect import cleandoc
from typing import Any

from comfy_api.latest import io

import nodes as comfy_nodes  # ComfyUI's module: this package goes by the name of its folder

from .common import (
    CATEGORY,
    RayActors,
    cfg_input,
    driver,
    ksampler_inputs,
    latent_input,
    model_input,
    prompt_inputs,
    seed_input,
)


class _Sampler(io.ComfyNode):
    @classmethod
    def _schema(cls, node_id: str, display_name: str, aliases: list[str], inputs: list[io.Input]) -> io.Schema:
        return io.Schema(
            node_id=node_id,
            display_name=display_name,
            category=CATEGORY,
            description=cleandoc(cls.__doc__),
            search_aliases=aliases,
            inputs=inputs,
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The denoised latent."),
                RayActors.Output(display_name="ray_actors", tooltip="The same model, for the next sampler."),
            ],
        )


class XFuserKSamplerAdvanced(_Sampler):
    """Denoise a latent on the workers of a Ray model: ComfyUI's KSampler (Advanced) on several GPUs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        aliases = ["ray ksampler", "multi gpu sampler", "parallel ksampler"]
        inputs = ksampler_inputs(seed=[seed_input()], noises=[])
        return cls._schema("XFuserKSamplerAdvanced", "XFuser KSampler (Advanced)", aliases, inputs)

    @classmethod
    def execute(cls, ray_actors: Any, **inputs: Any) -> io.NodeOutput:
        (latent,) = comfy_nodes.KSamplerAdvanced().sample(model=ray_actors, **inputs)
        return io.NodeOutput(latent, ray_actors)


class XFuserSamplerCustom(_Sampler):
    """Denoise a latent on the workers of a Ray model with any sampler and sigmas: ComfyUI's SamplerCustom."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            model_input(),
            io.Boolean.Input("add_noise", default=True, tooltip="Add noise before sampling."),
            seed_input(),
            cfg_input(),
            *prompt_inputs(),
            *_sampling_inputs(),
        ]
        aliases = ["ray sampler custom", "multi gpu sampler"]
        return cls._schema("XFuserSamplerCustom", "XFuser SamplerCustom", aliases, inputs)

    @classmethod
    def execute(cls, ray_actors: Any, **inputs: Any) -> io.NodeOutput:
        stock = comfy_nodes.NODE_CLASS_MAPPINGS["SamplerCustom"]
        return io.NodeOutput(stock.execute(model=ray_actors, **inputs).result[0], ray_actors)


class XFuserSamplerCustomAdvanced(_Sampler):
    """Denoise a latent on the workers of a Ray model with any guider: ComfyUI's SamplerCustomAdvanced.

    A guider made for another model samples the Ray model instead, with the patches of the other.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            model_input(),
            io.Noise.Input("noise", tooltip="The noise, from any noise node."),
            io.Guider.Input("guider", tooltip="The guidance, from any guider node."),
            *_sampling_inputs(),
        ]
        aliases = ["ray sampler custom advanced", "multi gpu sampler"]
        return cls._schema("XFuserSamplerCustomAdvanced", "XFuser SamplerCustomAdvanced", aliases, inputs)

    @classmethod
    def execute(cls, ray_actors: Any, guider: Any, **inputs: Any) -> io.NodeOutput:
        stock = comfy_nodes.NODE_CLASS_MAPPINGS["SamplerCustomAdvanced"]
        guider = driver().guided_by(guider, ray_actors)
        return io.NodeOutput(stock.execute(guider=guider, **inputs).result[0], ray_actors)


def _sampling_inputs() -> list[io.Input]:
    return [
        io.Sampler.Input("sampler", tooltip="The sampling algorithm, from any sampler node."),
        io.Sigmas.Input("sigmas", tooltip="The noise levels, from any scheduler node."),
        latent_input(),
    ]
