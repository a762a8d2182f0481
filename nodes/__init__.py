"""Raylight's nodes: thin doors to `raylight`."""

from comfy_api.latest import ComfyExtension, io

from .custom_sampler import XFuserSamplerCustom, XFuserSamplerCustomAdvanced
from .initializer import RayInitializer, RayInitializerAdvanced
from .kill import RayKill
from .loader import RayModelLoader, RayUNETLoader
from .lora import RayLoraLoader
from .parallel_lists import DPConditioningList, DPLatentList, DPNoiseList
from .parallel_samplers import DPKSamplerAdvanced, UnifiedParallelSampler
from .parallelize import RayParallelizeModel
from .sampler import XFuserKSamplerAdvanced
from .status import RaylightStatus


class RaylightExtension(ComfyExtension):
    """The list of nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [RayInitializer, RayInitializerAdvanced, RayUNETLoader, RayLoraLoader, RayModelLoader,
                RayParallelizeModel, XFuserKSamplerAdvanced, XFuserSamplerCustom, XFuserSamplerCustomAdvanced,
                DPKSamplerAdvanced, UnifiedParallelSampler, DPNoiseList, DPConditioningList, DPLatentList,
                RaylightStatus, RayKill]


async def comfy_entrypoint() -> RaylightExtension:
    """Called by ComfyUI once, when it starts."""
    return RaylightExtension()
