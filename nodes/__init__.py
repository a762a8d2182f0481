"""Raylight's nodes: schemas, and calls into `raylight.driver`."""

from comfy_api.latest import ComfyExtension, io

from . import early_ray, older_prompts
from .advice import RaylightAdvice
from .derived import derived_nodes
from .initializer import RayInitializer, RayInitializerAdvanced
from .loaders import RayLoraLoader, RayModelLoader, RayParallelizeModel, RayUNETLoader
from .older_forms import older_nodes
from .parallel_samplers import DPConditioningList, DPKSamplerAdvanced, DPLatentList, DPNoiseList, UnifiedParallelSampler
from .samplers import XFuserKSamplerAdvanced, XFuserSamplerCustom, XFuserSamplerCustomAdvanced
from .vae import RayParallelizeVAE, RayVAELoaderAsVAE
from .workers import RayKill, RaylightStatus


class RaylightExtension(ComfyExtension):
    """The pack's list of nodes."""

    async def on_load(self) -> None:
        older_prompts.register()
        early_ray.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            RayInitializer,
            RayInitializerAdvanced,
            RayUNETLoader,
            RayLoraLoader,
            RayModelLoader,
            RayParallelizeModel,
            RayVAELoaderAsVAE,
            RayParallelizeVAE,
            XFuserKSamplerAdvanced,
            XFuserSamplerCustom,
            XFuserSamplerCustomAdvanced,
            DPKSamplerAdvanced,
            UnifiedParallelSampler,
            DPNoiseList,
            DPConditioningList,
            DPLatentList,
            RaylightStatus,
            RaylightAdvice,
            RayKill,
            *older_nodes(),
            *derived_nodes(),
        ]


async def comfy_entrypoint() -> RaylightExtension:
    """Return the extension; ComfyUI calls this once, when it starts."""
    return RaylightExtension()
