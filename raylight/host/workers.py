"""The workers of a model, from ComfyUI's side: found or started, asked, and told to let go."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import comfy.model_management

from raylight.cluster import current
from raylight.cluster.config import ServiceSpec
from raylight.cluster.errors import RunCancelled, WorkerError
from raylight.cluster.session import Session

from . import presence, settings
from .advice import advised
from .handles import Workers
from .recipe import ModelRecipe

logger = logging.getLogger(__name__)


def service_spec() -> ServiceSpec:
    """What a session started from this ComfyUI runs in its workers."""
    return ServiceSpec("raylight.host.boot:open_service", settings.capture(), settings.python_path())


def session(workers: Workers, recipe: ModelRecipe, latent_shape: Sequence[int] | None = None) -> Session:
    """The workers' session, started now if it is not running, with room for a model and, where its latent's shape is
    known, for what sampling takes."""
    try:
        found = current.session(workers.config, service_spec(), comfy.model_management.processing_interrupted)
    except RunCancelled:
        _interrupt()
    except WorkerError as error:
        raise advised(error, workers.config, workers.sharding) from error.__cause__
    presence.announce(free)
    if workers.config.device_type == "cuda":
        # Workers share these GPUs with ComfyUI; neither sees what the other could give back.
        shape = None if latent_shape is None else tuple(latent_shape)
        presence.make_room(ask(found, "shortfall", recipe, shape, about=recipe))
    return found


def ask(session: Session, method: str, *arguments: Any, about: ModelRecipe | None = None) -> Any:
    """Call a method of the service on all workers; rank 0's result. Raises as `ask_all`."""
    return ask_all(session, method, *arguments, about=about)[0]


def ask_all(session: Session, method: str, *arguments: Any, about: ModelRecipe | None = None,
            on_event: Callable[[Any], None] | None = None) -> dict[int, Any]:
    """Call a method of the service on all workers, for the model `about`; the results by rank.

    Raises what `Session.run_all` raises, errors with what to try, and ComfyUI's interrupt when the person cancels."""
    try:
        return session.run_all(
            method, *arguments, on_event=on_event, wants_cancel=comfy.model_management.processing_interrupted
        )
    except RunCancelled:
        _interrupt()
    except WorkerError as error:
        raise advised(error, session.config, None if about is None else about.sharding) from error.__cause__


def _interrupt() -> NoReturn:
    """End the prompt as ComfyUI does when a person cancels it."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    raise comfy.model_management.InterruptProcessingException() from None


def free() -> None:
    """Have the workers, if there are any, let go of their models."""
    running = current.running()
    if running is None:
        return
    try:
        running.run("free")
    except (Exception, RunCancelled) as error:
        logger.warning("the workers could not free their memory: %s", error)
    else:
        logger.info("the workers have let go of their models")
