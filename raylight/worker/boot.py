"""The entry point of a worker: set up ComfyUI, then open the service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raylight.host import settings as host_settings

if TYPE_CHECKING:
    from raylight.cluster.actor import RankContext

    from .service import ModelService


def open_service(context: RankContext, settings: host_settings.HostSettings) -> ModelService:
    """Set up ComfyUI in this worker, and return the service."""
    host_settings.apply(settings, context.device.type)
    # Only now: ComfyUI picks devices and dtypes when it is imported.
    from .service import ModelService

    return ModelService(context, settings.gpu)
