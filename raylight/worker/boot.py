"""The entry points of a worker: set up ComfyUI, and open the service."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING

from raylight.cluster.timeline import WORKER
from raylight.host import comfy_patches
from raylight.host import settings as host_settings

if TYPE_CHECKING:
    from raylight.cluster.run import RankContext

    from .service import ModelService

# The service imports more of ComfyUI; `comfy.samplers` is what a run is serialized with.
IMPORTS = ("comfy.model_management", "comfy.model_base", "comfy.sd", "comfy.samplers", "raylight.worker.service")


def prepare(device_type: str, settings: host_settings.HostSettings) -> None:
    """Set up ComfyUI in this worker, and import what the service needs of it."""
    host_settings.apply(settings, device_type)
    # A compiled model calls functions whose results Raylight keeps. The compiler looks into them, which is right too.
    warnings.filterwarnings("ignore", message=r"Dynamo detected a call to a `functools\.lru_cache`")
    # Only now: ComfyUI picks devices and dtypes when it is imported.
    with comfy_patches.late_imports():
        for module in IMPORTS:
            importlib.import_module(module)
            WORKER.mark(module)


def open_service(context: RankContext, settings: host_settings.HostSettings) -> ModelService:
    """Return the service of this worker, which is prepared."""
    from .service import ModelService

    return ModelService(context, settings.gpu)
