"""The workers of a model, from ComfyUI's side: found or started, asked, and told to let go."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management

from raylight.cluster import current
from raylight.cluster.errors import RunCancelled, WorkerError
from raylight.cluster.session import Session

from . import boot, presence
from .handles import Workers
from .recipe import ModelRecipe

logger = logging.getLogger(__name__)


def session(workers: Workers, recipe: ModelRecipe, latent_shape: Sequence[int] | None = None) -> Session:
    """The workers' session, started now if it is not running, with room for a model and, where its latent's shape is
    known, for what sampling takes."""
    found = current.session(workers.config, boot.service_spec())
    presence.announce(free)
    if workers.config.device_type == "cuda":
        # Workers share these GPUs with ComfyUI; neither sees what the other could give back.
        presence.make_room(ask(found, "shortfall", recipe, None if latent_shape is None else tuple(latent_shape)))
    return found


def ask(session: Session, method: str, *arguments: Any) -> Any:
    """Call a method of the service on all workers; rank 0's result. Raises as `ask_all`."""
    return ask_all(session, method, *arguments)[0]


def ask_all(session: Session, method: str, *arguments: Any,
            on_event: Callable[[Any], None] | None = None) -> dict[int, Any]:
    """Call a method of the service on all workers; the results by rank.

    Raises what `Session.run` raises, and ComfyUI's interrupt when the person cancels."""
    try:
        return session.run_all(
            method, *arguments, on_event=on_event, wants_cancel=comfy.model_management.processing_interrupted
        )
    except RunCancelled:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise comfy.model_management.InterruptProcessingException() from None


def free() -> None:
    """Have the workers, if there are any, let go of their models."""
    running = current.running()
    if running is None:
        return
    try:
        running.run("free")
    except (WorkerError, RunCancelled, ValueError) as error:
        logger.warning("the workers could not free their memory: %s", error)
    else:
        logger.info("the workers have let go of their models")
