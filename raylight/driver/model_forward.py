"""Single calls of a diffusion model's methods, done by the workers, for sampling loops that stay in ComfyUI."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from raylight.cluster.errors import WorkerError
from raylight.cluster.serialization import SerializedObject, unpack
from raylight.cluster.tensor_delta import Sender
from raylight.host import patcher_state
from raylight.host.jobs import ForwardJob, random_state, set_random_state
from raylight.host.patcher_state import OPTIONS, bind_arguments, run_with_wrappers
from raylight.host.pickling import serialize
from raylight.host.worker_service import WorkerService

from . import forward_channel, memory, model_changes, written_weights
from .forward_channel import FORWARD, ForwardChannel
from .forward_extras import Extras, naming_the_node, sent_extras
from .model_job import model_job
from .outer_sample import begins_run, move_to_workers
from .remote_model import RemotePatcher
from .short_of_memory import may_repeat
from .workers import ask, ask_with_room, open_session


def forward_on_workers(patcher: RemotePatcher, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call `method` of the diffusion model on the workers. Return its output, with tensors on the device of the first
    tensor among the arguments.

    Wrappers around the diffusion model run in this process, as they do without workers. Raises ValueError, naming the
    node, for what nodes have put into the model and cannot be sent; what `workers.ask` raises; and ComfyUI's interrupt.
    """
    # As each layer of ComfyUI does. A forward may end before a wait for it would see that the user cancels.
    comfy.model_management.throw_exception_if_processing_interrupted()
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    device = next((tensor.device for tensor in tensors), patcher.load_device)
    if method != FORWARD:
        return _send(patcher, method, args, kwargs, device)
    return run_with_wrappers(
        patcher.model.diffusion_model,
        lambda *inner, **by_name: _send(patcher, method, inner, by_name, device),
        args,
        kwargs,
    )


def _send(
    patcher: RemotePatcher, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
) -> Any:
    channel = forward_channel.current() or forward_channel.begin(open_session(patcher.workers))
    try:
        job, has_code = _job(channel, patcher, method, args, kwargs)
        try:
            answer = _ask(channel, job)
        except WorkerError as error:
            # What code inside the model has kept since the run began is gone with the workers.
            if has_code or not may_repeat(error, job.model):
                raise
            channel = forward_channel.begin(open_session(patcher.workers))
            answer = _ask(channel, _job(channel, patcher, method, args, kwargs)[0])
    except BaseException:
        forward_channel.drop()  # what the workers have of this stream is not known any more
        raise
    output, random = unpack(answer, _no_reference, device)
    if random is not None:
        set_random_state(random)
    return _on(output, device)


def _job(
    channel: ForwardChannel, patcher: RemotePatcher, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[ForwardJob, bool]:
    """Return a call as a job, and whether code of nodes runs in it."""
    shape = next((tuple(value.shape) for value in args if isinstance(value, Tensor)), None)
    shape = shape if method == FORWARD else None  # other methods take no latent
    diffusion_model = patcher.model.diffusion_model
    args, kwargs = bind_arguments(getattr(type(diffusion_model), method), diffusion_model, args, kwargs)
    options = kwargs.pop(OPTIONS, None) or {}
    begins = begins_run()
    if begins:
        channel.looked_at.clear()
    if patcher.model not in channel.looked_at:
        written_weights.look(patcher.model, patcher.recipe)
        channel.looked_at.add(patcher.model)
    changes = model_changes.of_forward(patcher)
    extras = Extras.of(patcher_state.of_forward(patcher), options, changes)
    channel.extras = sent = sent_extras(channel.extras, extras, patcher, begins)
    handle = channel.session.shared.of(sent.key, lambda: sent.serialized(extras, patcher))
    content = args, kwargs, extras.data, *sent.others(extras, patcher)
    with naming_the_node(extras, patcher):
        call = serialize(content, patcher, foreign_code=True, also=_slots_of(channel.sender))
    model = model_job(channel.session, patcher, changes)
    move_to_workers(model.inside.full_tokens_for)
    random = random_state(patcher.load_device) if extras.has_code else None
    return ForwardJob(model, method, call, channel.sender.message(), handle, shape, begins, random), extras.has_code


def _ask(channel: ForwardChannel, job: ForwardJob) -> SerializedObject:
    """Return rank 0's answer to a job. ComfyUI may have to free memory for it, for the first of a run and of a model,
    and if it has used a model itself since.
    """
    recipe = job.model.recipe
    if not channel.has_room_for(job) or memory.others_were_used_since(channel.session):
        answer = ask_with_room(channel.session, WorkerService.forward, job, recipe)[0]
        channel.room = recipe, job.method == FORWARD
    else:
        memory.note_use(channel.session)
        answer = ask(channel.session, WorkerService.forward, job, False, about=recipe)
    assert isinstance(answer, SerializedObject)
    return answer


def _slots_of(sender: Sender) -> Any:
    return lambda value: sender.slot(value) if type(value) is Tensor else None


def _no_reference(reference: Any) -> Any:
    raise RuntimeError(f"a worker answered with {reference}, which this process cannot resolve")


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(_on(item, device) for item in value) if isinstance(value, (list, tuple)) else value
