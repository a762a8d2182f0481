"""Streams of tensors of which only changes are sent.

Consecutive forwards of a model get mostly the same tensors: the same conditioning, the same start image, another
latent. Both ends keep what was sent; the sender compares, and names what the receiver is to reuse. Of a latent only
changed channels are sent: those of a start image do not change.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .serialization import as_bytes, from_bytes

_SMALL = 4096  # bytes; keeping smaller tensors costs more than sending them
_PROBES = 32  # elements in a fingerprint, which differ for most different tensors


@dataclass(frozen=True, slots=True)
class Slot:
    """A reference to the tensor `number` of the same message."""

    number: int


@dataclass(frozen=True, slots=True)
class TensorUpdate:
    """One tensor of a message, kept by both ends as `key` unless that is None.

    `data` are its bytes, (bytes,) uint8; or those of its `channels` (dim 1), with the others as in the kept tensor
    `base`; or None if the tensor equals `base`.
    """

    key: int | None
    base: int | None
    channels: tuple[int, ...] | None
    data: np.ndarray | None
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Message:
    """The tensors of one message, by number. `forget` are keys that are not used any more.

    A receiver starts again when `stream` changes.
    """

    stream: str
    updates: tuple[TensorUpdate, ...]
    forget: tuple[int, ...]


class Sender:
    """The sending end of a stream. Keeps up to `limit` bytes of tensors, on their device."""

    def __init__(self, stream: str, limit: int) -> None:
        self._stream = stream
        self._limit = limit
        self._kept: OrderedDict[int, Tensor] = OrderedDict()
        self._keys: dict[Any, list[int]] = {}  # by fingerprint
        self._latest: dict[Any, int] = {}
        self._next_key = 0
        self._held_bytes = 0
        self._updates: list[TensorUpdate] = []
        self._forget: list[int] = []

    def slot(self, value: Tensor) -> Slot:
        """Add a tensor of any shape and dtype to the next message."""
        self._updates.append(self._update(value))
        return Slot(len(self._updates) - 1)

    def message(self) -> Message:
        """Return a message with all tensors since the last one."""
        message = Message(self._stream, tuple(self._updates), tuple(self._forget))
        self._updates, self._forget = [], []
        return message

    def _update(self, value: Tensor) -> TensorUpdate:
        value = value.detach()
        described = value.dtype, tuple(value.shape)
        if value.nbytes < _SMALL:
            return TensorUpdate(None, None, None, as_bytes(value), *described)
        form = _form(value)
        fingerprint = (form, _probe(value))
        for key in self._keys.get(fingerprint, ()):
            if torch.equal(self._kept[key], value):
                self._kept.move_to_end(key)
                return TensorUpdate(None, key, None, None, *described)
        base = None if value.ndim < 4 else self._latest.get(form)
        channels = () if base is None else _changed(self._kept[base], value)
        if base is None or len(channels) == value.shape[1]:
            base, channels, data = None, None, as_bytes(value)
        else:
            self._kept.move_to_end(base)
            data = as_bytes(value[:, list(channels)])
        return TensorUpdate(self._keep(value, form, fingerprint), base, channels, data, *described)

    def _keep(self, value: Tensor, form: Any, fingerprint: Any) -> int:
        key = self._next_key
        self._next_key += 1
        # A copy: samplers change latents in place.
        self._kept[key] = value.clone()
        self._keys.setdefault(fingerprint, []).append(key)
        self._latest[form] = key
        self._held_bytes += value.nbytes
        while self._held_bytes > self._limit and len(self._kept) > 1:
            self._drop(next(iter(self._kept)))
        return key

    def _drop(self, key: int) -> None:
        value = self._kept.pop(key)
        self._held_bytes -= value.nbytes
        self._forget.append(key)
        form = _form(value)
        if self._latest.get(form) == key:
            del self._latest[form]
        fingerprint = (form, _probe(value))
        self._keys[fingerprint].remove(key)
        if not self._keys[fingerprint]:
            del self._keys[fingerprint]


class Receiver:
    """The receiving end of a stream. Its tensors are on `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = ""
        self._kept: dict[int | None, Tensor] = {}

    def receive(self, message: Message) -> list[Tensor]:
        """Return the tensors of a message, by number. They are copies, which may be written to."""
        if message.stream != self._stream:
            self._stream, self._kept = message.stream, {}
        tensors = [self._tensor(update) for update in message.updates]
        for key in message.forget:
            self._kept.pop(key, None)
        return tensors

    def _tensor(self, update: TensorUpdate) -> Tensor:
        if update.data is None:
            return self._kept[update.base].clone()
        if update.channels is None:
            value = from_bytes(update.data, update.dtype, update.shape).to(self._device, copy=True)
        else:
            shape = (update.shape[0], len(update.channels), *update.shape[2:])
            value = self._kept[update.base].clone()
            value[:, list(update.channels)] = from_bytes(update.data, update.dtype, shape).to(self._device)
        if update.key is not None:
            self._kept[update.key] = value.clone()
        return value


def _form(value: Tensor) -> tuple[Any, ...]:
    """Return in what tensors agree that can be compared: PyTorch compares none of two devices."""
    return value.dtype, tuple(value.shape), value.device


def _probe(value: Tensor) -> bytes:
    flat = value.reshape(-1)
    return as_bytes(flat[:: max(1, flat.numel() // _PROBES)]).tobytes()


def _changed(before: Tensor, now: Tensor) -> tuple[int, ...]:
    """Return the channels (dim 1) in which two tensors of one shape, (B, C, ...), differ."""
    differs = (before != now).movedim(1, 0).flatten(1).any(1)
    return tuple(differs.nonzero().flatten().tolist())
