"""The workers, as ComfyUI's process uses them: start them and call them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import comfy.model_management

from raylight.cluster import active_session
from raylight.cluster.config import ServiceSpec, SessionConfig
from raylight.cluster.errors import CRASHED, DIED, HUNG, MACHINE_LOST, OUT_OF_MEMORY, RunCancelled
from raylight.cluster.session import Session
from raylight.host import settings
from raylight.host.jobs import DegreesChosen, ExchangeTold, LoadProgress, NeedsBytes
from raylight.host.recipe import OFFLOADED, REPLICATED, SHARDED, ModelRecipe, WorkerConfig

from . import machine_files, memory, progress, short_of_memory

logger = logging.getLogger(__name__)

R = TypeVar("R")
_REFUSALS = 2
_RESTART = "The workers restart by themselves"


def remedies(config: SessionConfig, sharding: str | None, kind: str) -> str:
    """Return what the user can do about a failure of `kind`; `sharding` is that of the model it is about."""
    if kind == OUT_OF_MEMORY:
        return f"What helps, in this order: {'; '.join(_for_memory(config, sharding))}. {_RESTART}."
    if kind == DIED:
        return (
            f"{_RESTART}. If it happens again, the system's memory may be too small: "
            f"{'; '.join(_for_memory(config, sharding))}."
        )
    if kind == CRASHED:
        return (
            f"{_RESTART}. If it happens again, choose another attention in the initializer, as kernels of libraries "
            f"can crash. A bus error means that the model file was changed while it was in use, or /dev/shm is full."
        )
    if kind == MACHINE_LOST:
        return (
            f"{_RESTART}: with GPU = 0 and degrees of 0 on the machines that are left, else when as many workers have "
            f"room again."
        )
    if kind == HUNG:
        return (
            f"{_RESTART}. If it happens again on GPUs, start ComfyUI with NCCL_P2P_DISABLE=1; NCCL_DEBUG=INFO shows "
            f"what NCCL does."
        )
    return f"{_RESTART}."


def _for_memory(config: SessionConfig, sharding: str | None) -> list[str]:
    several = config.world_size > 1
    found = []
    if sharding == REPLICATED and several:
        found.append("switch FSDP on, so that each GPU holds a part of the weights only")
    if sharding == SHARDED:
        found.append("switch FSDP_CPU_OFFLOAD on, so that weights stay in system memory")
    if sharding == OFFLOADED:
        found.append("close what else takes GPU or system memory")
    if config.mesh.batch > 1:
        found.append(
            "lower cfg_degree or dp_degree and raise ulysses_degree, so that more GPUs share the tokens of "
            "one image or video"
        )
    found.append("a smaller size, fewer frames or a smaller batch")
    found.append("a file with smaller weights (fp8, GGUF)")
    return found


def service_spec(config: SessionConfig) -> ServiceSpec:
    """Describe what workers of this ComfyUI, of a configuration, run."""
    boot = "raylight.worker.boot"
    return ServiceSpec(
        f"{boot}:open_service",
        settings.capture(config.is_local),
        settings.python_path(),
        f"{boot}:prepare",
        settings.LIBRARIES,
        settings.LIBRARIES_FOR_GPUS,
    )


def begin(workers: WorkerConfig, replace: bool) -> None:
    """Start the workers in the background, unless they run or start already; with `replace`, in the place of others.

    An error is raised by `open_session`.
    """
    active_session.begin(
        workers.config,
        service_spec(workers.config),
        functools.partial(remedies, workers.config, workers.sharding),
        replace,
    )


def begin_ray(config: SessionConfig) -> None:
    """Start Ray in the background for workers that may be wanted soon, unless there are any."""
    active_session.begin_ray(config, service_spec(config))


def open_session(workers: WorkerConfig) -> Session:
    """Return the workers' session; start it if it is not running, and say so on the executing node.

    Raises what `active_session.session` raises, errors with a remedy, and ComfyUI's interrupt when the user cancels.
    """
    try:
        found = active_session.session(
            workers.config,
            service_spec(workers.config),
            comfy.model_management.processing_interrupted,
            functools.partial(remedies, workers.config, workers.sharding),
            progress.show_text,
        )
    except RunCancelled:
        _interrupt()
    memory.register(found)
    return found


def ask(session: Session, verb: Callable[..., R], *arguments: Any, about: ModelRecipe | None = None) -> R:
    """Call a verb of `WorkerService` on all workers, and return rank 0's result. Raises as `ask_all`."""
    return ask_all(session, verb, *arguments, about=about)[0]


def ask_all(
    session: Session,
    verb: Callable[..., R],
    *arguments: Any,
    about: ModelRecipe | None = None,
    on_event: Callable[[Any], None] = lambda _: None,
) -> dict[int, R]:
    """Call a verb of `WorkerService` on all workers, for the model `about`, and return the results by rank.

    The progress of loading, the degrees of a run and what is told of its exchanges go to the executing node, other
    events to `on_event`. Raises what `Session.run_all` raises, errors with a remedy, and ComfyUI's interrupt when the
    user cancels.
    """
    loading = progress.Loading()

    def listen(event: Any) -> None:
        if isinstance(event, LoadProgress):
            loading.show(event)
        elif isinstance(event, DegreesChosen):
            loading.show_degrees(event)
        elif isinstance(event, ExchangeTold):
            loading.show_exchange(event)
        else:
            on_event(event)

    try:
        with short_of_memory.noted(about):
            results = session.run_all(
                verb,
                *arguments,
                on_event=listen,
                wants_cancel=comfy.model_management.processing_interrupted,
                remedies=functools.partial(remedies, session.config, None if about is None else about.sharding),
            )
    except RunCancelled:
        _interrupt()
    loading.end()
    return results


def ask_with_room(
    session: Session,
    verb: Callable[..., R | NeedsBytes],
    job: Any,
    about: ModelRecipe,
    on_event: Callable[[Any], None] = lambda _: None,
) -> dict[int, R]:
    """Call a verb that may refuse `job` because GPU memory is short. If it does, have ComfyUI free what is missing on
    the GPUs that it shares with workers, and send the job again: it may be refused once to load the model and once to
    sample. What is missing on other GPUs the workers find themselves, or do without.

    Raises what `ask_all` raises.
    """
    try:
        machine_files.ensure(session, about, comfy.model_management.processing_interrupted)
    except RunCancelled:
        _interrupt()
    refusals_left = _REFUSALS if session.config.device_type == "cuda" else 0
    try:
        while True:
            answers = ask_all(session, verb, job, refusals_left > 0, about=about, on_event=on_event)
            refusals = {rank: answer for rank, answer in answers.items() if isinstance(answer, NeedsBytes)}
            if not refusals:
                return {rank: answer for rank, answer in answers.items() if not isinstance(answer, NeedsBytes)}
            freed = memory.make_room(session, refusals)
            refusals_left = refusals_left - 1 if freed else 0
    finally:
        memory.note_use(session)  # a cancelled run, too; not before a refusal is answered, which changes nothing


def _interrupt() -> NoReturn:
    """End the prompt as ComfyUI does when the user cancels it."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    raise comfy.model_management.InterruptProcessingException() from None
