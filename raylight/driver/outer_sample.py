"""A whole run of a sampler, done by the workers.

ComfyUI's own guider and sampler run there as they would here; neither is written a second time.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import comfy.samplers
import comfy.utils
from comfy.cli_args import LatentPreviewMethod, args
from torch import Tensor

from raylight.cluster.serialization import SerializedObject
from raylight.host import patcher_state
from raylight.host.foreign_code import node_name_of, replaced_in_loop
from raylight.host.jobs import RandomState, RunJob, random_state
from raylight.host.patcher_state import Change
from raylight.host.pickling import NotSerializableError, serialize

from . import forward_channel, injected_code, memory, model_changes, shared_state, written_weights
from .batched_runs import join_batch
from .model_job import model_job
from .pending_run import PendingRun, complete
from .remote_model import RemotePatcher
from .workers import open_session

logger = logging.getLogger(__name__)

_SHOWS = ("decode_latent_to_preview", "decode_latent_to_preview_image")  # what a callback calls of a previewer
_may_move = _run_begins = False


class MoveToWorkers(BaseException):
    """Ends a run in this process that the workers have to do as a whole. Not an Exception, so that no handler of errors
    stops it. `full_tokens_for` is as in `Inside`.
    """

    def __init__(self, full_tokens_for: str) -> None:
        self.full_tokens_for = full_tokens_for


def move_to_workers(full_tokens_for: str) -> None:
    """Raise MoveToWorkers if this is the first forward of a run that may move, and needs to.

    Call it before each forward that is sent.
    """
    global _may_move
    if _may_move and full_tokens_for:
        raise MoveToWorkers(full_tokens_for)
    _may_move = False


def begins_run() -> bool:
    """Return whether this is the first forward that is sent of a run whose loop stays here. Call it for each once."""
    global _run_begins
    begins, _run_begins = _run_begins, False
    return begins


@contextmanager
def _moving_at_first_forward() -> Iterator[None]:
    global _may_move
    _may_move = True
    try:
        yield
    finally:
        _may_move = False


def run_on_workers(executor: Any, *arguments: Any, **named: Any) -> Tensor:
    """Do on the workers the sampling that `executor` wraps, if all of it can be sent: an OUTER_SAMPLE wrapper of
    ComfyUI. Return the latent, (B, C, [T,] H, W) or packed.

    Otherwise the sampling loop stays in this process and sends each forward of the model. Raises what
    `workers.ask_all` raises.
    """
    guider = executor.class_obj
    patcher = guider.model_patcher
    if not isinstance(patcher, RemotePatcher):
        return executor(*arguments, **named)
    run = functools.partial(executor, *arguments, **named)
    call = inspect.signature(executor.original).bind(*arguments, **named).arguments
    callback, call["callback"] = call.get("callback"), None
    inner = executor.wrappers[executor.idx + 1 :]
    # Only asked where something may keep the run here: it looks at all that code of nodes reaches.
    sharing = functools.cache(functools.partial(shared_state.owner_in_run, patcher, guider, call, inner))
    stay = functools.partial(_stay, patcher, run, sharing)
    injected_code.begin()
    random = random_state(patcher.load_device)
    try:
        changes = _changes(patcher)
        content, reason = _content(patcher, (changes, guider, call, len(arguments), inner))
    except NotSerializableError as error:
        return stay(error)
    full_tokens_for = ""
    if reason:
        full_tokens_for = injected_code.inside_of(patcher, changes).full_tokens_for
        if not full_tokens_for and (owner := sharing()):
            logger.info("the workers do the whole run with the code of %s, whose parts share state", owner)
        elif not full_tokens_for:
            try:
                with _moving_at_first_forward():
                    return stay(reason)
            except MoveToWorkers as moved:
                full_tokens_for = moved.full_tokens_for
    pending = _pending(patcher, changes, full_tokens_for, content, call, random, callback)
    try:
        result = join_batch(pending) or complete([pending])[0]
    except NotSerializableError as error:
        return stay(error)
    return pending.conclude(result)


def _changes(patcher: RemotePatcher) -> list[Change]:
    """Return the changes on the model itself, and note which weights were written to. Raises NotSerializableError where
    the sampling loop was changed.
    """
    for first in replaced_in_loop():
        raise NotSerializableError(
            f"code of another node pack takes the place of {first.place} ({node_name_of(first.value)})"
        )
    changes = model_changes.of_run(patcher)
    written_weights.look(patcher.model, patcher.recipe)
    return changes


def _content(patcher: RemotePatcher, run: tuple[Any, ...]) -> tuple[SerializedObject, str]:
    """Serialize a run without code of node packs if possible, else with it and the reason why: such a run goes to the
    workers only if that code needs full tokens. Raises NotSerializableError.
    """
    content = (patcher_state.of_run(patcher), *run)
    try:
        return serialize(content, patcher, foreign_code=False), ""
    except NotSerializableError as reason:
        try:
            return serialize(content, patcher, foreign_code=True, networks=False), str(reason)
        except NotSerializableError:
            raise reason from None


def _pending(
    patcher: RemotePatcher,
    changes: Sequence[Change],
    full_tokens_for: str,
    content: SerializedObject,
    call: dict[str, Any],
    random: RandomState,
    callback: Callable[..., Any] | None,
) -> PendingRun:
    session = open_session(patcher.workers)
    # ComfyUI's own callback shows a preview and the last step; others may look at all of every step.
    previewer = _previewer(callback, call.get("latent_shapes"))
    every_step = callback is not None and previewer is None
    is_whole = not every_step and _looks_at_all(callback)
    job = RunJob(
        model_job(session, patcher, changes, full_tokens_for),
        content,
        tuple(call["noise"].shape),
        random,
        patcher.workers.free_memory_after,
        wants_preview=callback is not None and (is_whole or args.preview_method != LatentPreviewMethod.NoPreviews),
        every_step=every_step,
        wants_last=callback is not None and not every_step,
        whole_preview=is_whole,
    )
    shows_bar = comfy.utils.PROGRESS_BAR_ENABLED and not call.get("disable_pbar")
    renewed = functools.partial(_pending, patcher, changes, full_tokens_for, content, call, random, callback)
    return PendingRun(session, job, previewer or callback, shows_bar, renewed)


def _previewer(callback: Any, latent_shapes: Sequence[tuple[int, ...]] | None) -> Callable[..., Any] | None:
    """Return ComfyUI's own callback, None if this is another one. Latents of several kinds are unpacked for it as by
    the function that ComfyUI puts around it, which would also unpack what is not sent.
    """
    if _is_of_previews(callback):
        return callback
    inner = _packed(callback)
    if not _is_of_previews(inner) or latent_shapes is None:
        return None
    from comfy.nested_tensor import NestedTensor  # which versions of ComfyUI without that function lack

    def unpacked(step: int, x0: Tensor | None, x: Tensor | None, total: int) -> Any:
        kinds = [
            None if one is None else NestedTensor(comfy.utils.unpack_latents(one, latent_shapes)) for one in (x0, x)
        ]
        return inner(step, *kinds, total)

    return unpacked


def _packed(callback: Any) -> Any:
    """Return the callback within the function that ComfyUI puts around it for latents of several kinds; None if this is
    not that function.
    """
    if getattr(callback, "__module__", None) != comfy.samplers.__name__ or not isinstance(callback, FunctionType):
        return None
    return inspect.getclosurevars(callback).nonlocals.get("packed_callback")


def _looks_at_all(callback: Any) -> bool:
    """Return whether the previewer of ComfyUI's own callback is of a node pack, which may show all images and frames:
    some show a video as such, and replace ComfyUI's function that makes the previewer.
    """
    callback = _packed(callback) or callback
    if not isinstance(callback, FunctionType):
        return False
    previewer = inspect.getclosurevars(callback).nonlocals.get("previewer")
    return previewer is not None and not all(_is_of_previews(getattr(previewer, name, None)) for name in _SHOWS)


def _is_of_previews(function: Any) -> bool:
    return getattr(function, "__module__", None) == "latent_preview"


def _stay(
    patcher: RemotePatcher, run: Callable[[], Tensor], sharing: Callable[[], str], reason: str | NotSerializableError
) -> Tensor:
    """Do the run here, and take back what it has put on the model, which the next run may not load. `sharing` returns
    the name of the node whose code inside the model shares state with code around it, "" if there is none.

    Raises ValueError: if there is one, as its code inside would not see what the code here does.
    """
    global _run_begins
    if owner := sharing():
        raise ValueError(
            f"{owner} has code inside the model that shares what it keeps with its code around the model, so the "
            f"workers would have to do the whole run, which is not possible: {reason}. Remove the node, or what keeps "
            f"the run in ComfyUI, or use a MODEL without workers"
        )
    logger.info("the sampling loop stays in ComfyUI, and each forward goes to the workers: %s", reason)
    _run_begins = True
    try:
        with memory.run_in_comfyui():
            return run()
    finally:
        forward_channel.end_run()
        patcher.unpatch_model(unpatch_weights=False)
