"""The entry points of a worker: set up ComfyUI, and open the service."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from raylight.cluster.timeline import WORKER
from raylight.host import settings as host_settings

if TYPE_CHECKING:
    from raylight.cluster.actor import RankContext

    from .service import ModelService


def prepare(device_type: str, settings: host_settings.HostSettings) -> None:
    """Set up ComfyUI in this worker, and import what the service needs of it."""
    host_settings.apply(settings, device_type)
    # Only now: ComfyUI picks devices and dtypes when it is imported.
    for module in ("comfy.model_management", "comfy.model_base", "comfy.sd", "raylight.worker.service"):
        importlib.import_module(module)
        WORKER.mark(module)


def open_service(context: RankContext, settings: host_settings.HostSettings) -> ModelService:
    """Return the service of this worker, which is prepared."""
    from .service import ModelService

    return ModelService(context, settings.gpu)
