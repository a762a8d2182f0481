"""Raylight's nodes: thin doors to `raylight`."""

from comfy_api.latest import ComfyExtension, io

from .initializer import RayInitializer, RayInitializerAdvanced
from .loader import RayModelLoader, RayUNETLoader
from .lora import RayLoraLoader
from .parallelize import RayParallelizeModel
from .sampler import XFuserKSamplerAdvanced


class RaylightExtension(ComfyExtension):
    """The list of nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [RayInitializer, RayInitializerAdvanced, RayUNETLoader, RayLoraLoader, RayModelLoader,
                RayParallelizeModel, XFuserKSamplerAdvanced]


async def comfy_entrypoint() -> RaylightExtension:
    """Called by ComfyUI once, when it starts."""
    return RaylightExtension()
