"""Deprecated nodes of saved workflows that no single node of ComfyUI does the work of, and older forms of others.

A node whose inputs have changed since keeps its id for its form of today. `older_prompts.py` and
`web/saved_workflows.js` give the older form the id that it has here.
"""

from __future__ import annotations

from inspect import cleandoc
from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder

from raylight.host.recipe import WorkerConfig

from .common import CATEGORY, RayActors, RayGuider, latent_input, model_input, seed_input
from .derived import call, inputs_like
from .loaders import RayUNETLoader
from .parallel_samplers import SLOTS

LIKE_THE_FILE = "default"


class RayGGUFLoader(RayUNETLoader):
    """For saved workflows. In new ones use Load Diffusion Model as MODEL (Ray), which takes GGUF files, too."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = super().define_schema()
        schema.node_id, schema.display_name, schema.is_deprecated = "RayGGUFLoader", "Load GGUF Model (Ray)", True
        schema.description = cleandoc(cls.__doc__ or "")
        (dtype,) = (index for index, one in enumerate(schema.inputs) if one.id == "weight_dtype")
        schema.inputs[dtype : dtype + 1] = [
            io.Combo.Input(
                name,
                options=[LIKE_THE_FILE, "target", "float32", "float16", "bfloat16"],
                default=LIKE_THE_FILE,
                tooltip=f"The data type of {what}. The workers know the default only.",
            )
            for name, what in (("dequant_dtype", "dequantized weights"), ("patch_dtype", "LoRAs"))
        ]
        return schema

    @classmethod
    def execute(
        cls,
        unet_name: str,
        dequant_dtype: str,
        patch_dtype: str,
        ray_actors_init: WorkerConfig | None = None,
        lora: tuple[Any, ...] = (),
    ) -> io.NodeOutput:
        for name, value in (("dequant_dtype", dequant_dtype), ("patch_dtype", patch_dtype)):
            if value != LIKE_THE_FILE:
                raise ValueError(f"{name} = {value}: the workers compute with the default only. Choose {LIKE_THE_FILE}")
        return super().execute(unet_name, "default", ray_actors_init, lora)


class DPNoiseListSeeds(io.ComfyNode):
    """For saved workflows: DP Noise List with a seed for each image. In new ones connect noise nodes to DP Noise
    List.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DPNoiseListSeeds",
            display_name="DP Noise List (Seeds)",
            category=CATEGORY,
            description=cleandoc(cls.__doc__ or ""),
            search_aliases=["data parallel seeds"],
            inputs=[_seed(slot) for slot in range(1, SLOTS + 1)],
            outputs=[io.Noise.Output(display_name="noise_list", is_output_list=True, tooltip="A noise for each seed.")],
            is_deprecated=True,
        )

    @classmethod
    def execute(cls, **seeds: int) -> io.NodeOutput:
        in_order = (seeds[f"seed_{slot}"] for slot in range(1, SLOTS + 1) if f"seed_{slot}" in seeds)
        return io.NodeOutput([call("RandomNoise", {"noise_seed": seed})[0] for seed in in_order])


def _seed(slot: int) -> io.Input:
    tooltip = f"Seed of image {slot}."
    most = 0xFFFFFFFFFFFFFFFF
    # Optional, because prompts of scripts may have fewer.
    return io.Int.Input(
        f"seed_{slot}", default=0, min=0, max=most, control_after_generate=True, optional=slot > 1, tooltip=tooltip
    )


class XFuserSamplerCustomAdvancedSeed(io.ComfyNode):
    """For saved workflows: XFuser SamplerCustomAdvanced with a seed, for a guider of Ray. In new ones use ComfyUI's
    SamplerCustomAdvanced, with a MODEL from Load Diffusion Model as MODEL (Ray) for the guider.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="XFuserSamplerCustomAdvancedSeed",
            display_name="XFuser SamplerCustomAdvanced (Seed)",
            category=CATEGORY,
            description=cleandoc(cls.__doc__ or ""),
            search_aliases=["ray sampler custom advanced"],
            inputs=[
                io.Boolean.Input("add_noise", default=True, tooltip="Add noise before sampling."),
                seed_input(),
                RayGuider.Input("guider", tooltip="The guidance, from a guider of Ray."),
                io.Sampler.Input("sampler", tooltip="The sampling algorithm, from any sampler node."),
                io.Sigmas.Input("sigmas", tooltip="The noise levels, from any scheduler node."),
                latent_input(),
            ],
            outputs=[
                io.Latent.Output(display_name="output", tooltip="The latent after the last step."),
                io.Latent.Output(display_name="denoised_output", tooltip="What the last step showed."),
                RayActors.Output(display_name="ray_actors", tooltip="The guider's model, for the next sampler."),
            ],
            is_deprecated=True,
        )

    @classmethod
    def execute(cls, add_noise: bool, noise_seed: int, guider: Any, **inputs: Any) -> io.NodeOutput:
        (noise,) = call("RandomNoise", {"noise_seed": noise_seed}) if add_noise else call("DisableNoise", {})
        output, denoised = call("SamplerCustomAdvanced", {"noise": noise, "guider": guider, **inputs})
        return io.NodeOutput(output, denoised, guider.model_patcher)


class RayVAEDecodeDistributed(io.ComfyNode):
    """For saved workflows: becomes Load VAE (Ray), on the workers of ray_actors, and VAE Decode (Tiled). The workers
    split the rows of the picture, which needs no tiles: their sizes have no effect. In new workflows use Load VAE (Ray)
    and VAE Decode.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        tiled = {one.id: one for one in inputs_like("VAEDecodeTiled")}
        (file,) = inputs_like("VAELoader")
        return io.Schema(
            node_id="RayVAEDecodeDistributed",
            display_name="VAE Decode Distributed (Ray)",
            category=CATEGORY,
            description=cleandoc(cls.__doc__ or ""),
            search_aliases=["ray vae decode"],
            inputs=[
                RayActors.Input("ray_actors", raw_link=True, tooltip=model_input().tooltip),
                io.Latent.Input("samples", raw_link=True, tooltip="The latent to decode."),
                file,
                *(one for name, one in tiled.items() if name not in ("samples", "vae")),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The decoded images.")],
            is_deprecated=True,
            enable_expand=True,
        )

    @classmethod
    def execute(cls, ray_actors: Any, samples: Any, vae_name: str, **tiles: int) -> io.NodeOutput:
        graph = GraphBuilder()
        vae = graph.node("RayVAELoaderAsVAE", vae_name=vae_name, ray_actors=ray_actors)
        image = graph.node("VAEDecodeTiled", samples=samples, vae=vae.out(0), **tiles)
        return io.NodeOutput(image.out(0), expand=graph.finalize())


def older_nodes() -> list[type[io.ComfyNode]]:
    """Return these nodes."""
    return [RayGGUFLoader, DPNoiseListSeeds, XFuserSamplerCustomAdvancedSeed, RayVAEDecodeDistributed]
