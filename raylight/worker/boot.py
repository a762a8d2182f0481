"""The first thing that a worker runs of ComfyUI's side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raylight.host import settings as host_settings

if TYPE_CHECKING:
    from raylight.cluster.actor import RankContext

    from .service import ModelService


def open_service(context: RankContext, settings: host_settings.HostSettings) -> ModelService:
    """Set ComfyUI up in this worker and open the service on it."""
    host_settings.apply(settings, context.device.type)
    # Only now: ComfyUI picks devices and dtypes when it is imported.
    from .service import ModelService

    return ModelService(context)
