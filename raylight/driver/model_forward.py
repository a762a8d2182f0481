"""Single calls of a diffusion model's methods, done by the workers, for loops that stay in ComfyUI."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raylight.cluster.serialization import SerializedObject, unpack
from raylight.cluster.session import Session
from raylight.cluster.tensor_delta import Sender
from raylight.host import patcher_state
from raylight.host.foreign_code import node_name_of
from raylight.host.jobs import ForwardJob
from raylight.host.patcher_state import OPTIONS, Change, bind_arguments, run_with_wrappers
from raylight.host.pickling import NotSerializableError, serialize
from raylight.host.worker_service import WorkerService

from . import model_changes, outer_sample
from . import workers as at_workers
from .model_job import model_job
from .remote_model import RemotePatcher

FORWARD = "forward"
_KEPT_BYTES = 128 * 2**20
# These run in this process, around the call.
_OUTSIDE = ("wrappers", "callbacks")
_PLAIN = (bool, int, float, str, bytes, Tensor, torch.dtype, torch.device, torch.Size, uuid.UUID)
# What is called inside of the model.
_CODE = ("patches", "patches_replace", "optimized_attention_override")


class ForwardChannel:
    """What this process keeps between the calls that it sends to one session."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.sender = Sender(uuid.uuid4().hex, _KEPT_BYTES)
        self.is_new = True
        self.extras_key = ""
        self.extras_of: list[Any] = []


_channel: ForwardChannel | None = None


def forward(patcher: RemotePatcher, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `method` of the model's diffusion model returns, with tensors where those of the arguments are.

    Wrappers around the diffusion model run in this process, as they do without workers. Raises ValueError, naming the
    node, for what nodes have put into the model and cannot be sent; and what `workers.ask` raises.
    """
    device = next(
        (value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), patcher.load_device
    )
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
    global _channel
    if _channel is None or not _channel.session.alive:
        _channel = ForwardChannel(at_workers.session(patcher.workers))
    line = _channel
    shape = next((tuple(value.shape) for value in args if isinstance(value, Tensor)), None)
    diffusion_model = patcher.model.diffusion_model
    args, kwargs = bind_arguments(getattr(type(diffusion_model), method), diffusion_model, args, kwargs)
    options = kwargs.pop(OPTIONS, None) or {}
    try:
        changes = model_changes.of_forward(patcher)
        extras = line.session.shared.of(*_extras(line, patcher, options, changes))
        data = {name: value for name, value in options.items() if name not in _OUTSIDE and _is_plain(value)}
        call = serialize((args, kwargs, data), patcher, foreign_code=True, also=_taking(line.sender))
        model = model_job(line.session, patcher, changes)
        outer_sample.move_to_workers(model.inside.full_tokens_for)
        job = ForwardJob(model, method, call, line.sender.message(), extras, shape)
        if line.is_new:
            answer = at_workers.ask_with_room(line.session, WorkerService.forward, job, patcher.recipe)[0]
            line.is_new = False
        else:
            answer = at_workers.ask(line.session, WorkerService.forward, job, False, about=patcher.recipe)
    except BaseException:
        _channel = None  # what the workers have of this stream is not known any more
        raise
    return _on(unpack(answer, _no_reference, device), device)


def _extras(
    line: ForwardChannel, patcher: RemotePatcher, options: Mapping[str, Any], changes: list[Change]
) -> tuple[str, Any]:
    """A key, and a function that makes the SerializedObject, of what nodes have put into the model: made once as long
    as these are the same objects."""
    code = {name: options[name] for name in _CODE if options.get(name)}
    if code:  # which may look at anything in the options
        code |= {name: value for name, value in options.items() if name not in _OUTSIDE and not _is_plain(value)}
    inner = patcher_state.of_forward(patcher)
    objects = list(
        _leaves(
            (code, inner, str(patcher.patches_uuid), [(change.owner, change.name, change.value) for change in changes])
        )
    )
    if (
        not line.extras_key
        or len(objects) != len(line.extras_of)
        or any(now is not before and now != before for now, before in zip(objects, line.extras_of, strict=True))
    ):
        line.extras_key, line.extras_of = f"extras-{uuid.uuid4().hex}", objects
    return line.extras_key, lambda: _packed(patcher, code, inner, changes)


def _packed(
    patcher: RemotePatcher, code: dict[str, Any], inner: patcher_state.PatcherState, changes: list[Change]
) -> SerializedObject:
    try:
        return serialize((inner, code, changes), patcher, foreign_code=True)
    except NotSerializableError as error:
        for part in _leaves((code, inner, [change.value for change in changes])):
            try:
                serialize(part, patcher, foreign_code=True)
            except NotSerializableError as reason:
                raise ValueError(
                    f"{node_name_of(part)} changes the inside of the model in a way that cannot be sent to the "
                    f"workers ({reason}): remove it, or take the model from one of ComfyUI's loaders"
                ) from error
        raise ValueError(f"what nodes have put into the model cannot be sent to the workers: {error}") from error


def _leaves(value: Any) -> Any:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, (list, tuple, set)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, _PLAIN)


def _taking(sender: Sender) -> Any:
    def refer(value: Any) -> Any:
        return sender.slot(value) if type(value) is Tensor else None

    return refer


def _no_reference(reference: Any) -> Any:
    raise RuntimeError(f"a worker answered with {reference}, which this process cannot resolve")


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(_on(item, device) for item in value) if isinstance(value, (list, tuple)) else value
