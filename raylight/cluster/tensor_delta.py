"""Tensors that are sent again and again, of which only what is new travels.

Each forward of a model gets mostly what the last one got: the same conditioning, the same image to start from, another
latent. The sender keeps what it has sent and compares; the receiver keeps it too and is told what to reuse. A latent
with channels that stay, such as those of an image that a video starts from, travels without them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .serialization import as_bytes, from_bytes

_SMALL = 4096  # bytes; below this, remembering costs more than sending
_PROBES = 32  # elements that tell most different tensors apart before all are compared


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands in a message for the tensor `number` of the same message."""

    number: int


@dataclass(frozen=True, slots=True)
class TensorUpdate:
    """One tensor of a message. `key` is its name for later, None if it is not kept. `data` are the bytes of all of it,
    of channels `channels` (dim 1) where the others are as in the tensor `base`, or None: then it is `base`."""

    key: int | None
    base: int | None
    channels: tuple[int, ...] | None
    data: np.ndarray | None
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Message:
    """The tensors of one message, by number; `forget` are keys that come up no more. A receiver that knows another
    `stream` begins anew."""

    stream: str
    pieces: tuple[TensorUpdate, ...]
    forget: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return sum(piece.data.nbytes for piece in self.pieces if piece.data is not None)


class Sender:
    """What one process has sent in a stream. Keeps up to `limit` bytes of tensors where they are."""

    def __init__(self, stream: str, limit: int) -> None:
        self._stream = stream
        self._limit = limit
        self._kept: OrderedDict[int, Tensor] = OrderedDict()
        self._prints: dict[Any, list[int]] = {}
        self._latest: dict[Any, int] = {}
        self._next_key = 0
        self._held_bytes = 0
        self._pieces: list[TensorUpdate] = []
        self._forget: list[int] = []

    def slot(self, value: Tensor) -> Slot:
        """Take a tensor into the message that is being made."""
        self._pieces.append(self._piece(value))
        return Slot(len(self._pieces) - 1)

    def message(self) -> Message:
        """The message with all tensors since the last."""
        message = Message(self._stream, tuple(self._pieces), tuple(self._forget))
        self._pieces, self._forget = [], []
        return message

    def _piece(self, value: Tensor) -> TensorUpdate:
        value = value.detach()
        form = (value.dtype, tuple(value.shape))
        if value.nbytes < _SMALL:
            return TensorUpdate(None, None, None, as_bytes(value), *form)
        fingerprint = (form, _probe(value))
        for key in self._prints.get(fingerprint, ()):
            if torch.equal(self._kept[key], value):
                self._kept.move_to_end(key)
                return TensorUpdate(None, key, None, None, *form)
        base = self._latest.get(form)
        channels = None if base is None or value.ndim < 4 else _changed(self._kept[base], value)
        if channels is None or len(channels) == value.shape[1]:
            base, channels, data = None, None, as_bytes(value)
        else:
            self._kept.move_to_end(base)
            data = as_bytes(value[:, list(channels)])
        return TensorUpdate(self._keep(value, form, fingerprint), base, channels, data, *form)

    def _keep(self, value: Tensor, form: Any, fingerprint: Any) -> int:
        key = self._next_key
        self._next_key += 1
        # A copy: samplers change latents in place.
        self._kept[key] = value.clone()
        self._prints.setdefault(fingerprint, []).append(key)
        self._latest[form] = key
        self._held_bytes += value.nbytes
        while self._held_bytes > self._limit and len(self._kept) > 1:
            self._drop(next(iter(self._kept)))
        return key

    def _drop(self, key: int) -> None:
        value = self._kept.pop(key)
        self._held_bytes -= value.nbytes
        self._forget.append(key)
        form = (value.dtype, tuple(value.shape))
        if self._latest.get(form) == key:
            del self._latest[form]
        keys = self._prints[form, _probe(value)]
        keys.remove(key)
        if not keys:
            del self._prints[form, _probe(value)]


class Receiver:
    """The other end of a stream. Tensors are on `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = ""
        self._kept: dict[int, Tensor] = {}

    def receive(self, message: Message) -> list[Tensor]:
        """The tensors of a message, by number. They are this process's own and may be written to."""
        if message.stream != self._stream:
            self._stream, self._kept = message.stream, {}
        tensors = [self._tensor(piece) for piece in message.pieces]
        for key in message.forget:
            self._kept.pop(key, None)
        return tensors

    def _tensor(self, piece: TensorUpdate) -> Tensor:
        if piece.data is None:
            return self._kept[piece.base].clone()
        if piece.channels is None:
            value = from_bytes(piece.data, piece.dtype, piece.shape).to(self._device, copy=True)
        else:
            shape = (piece.shape[0], len(piece.channels), *piece.shape[2:])
            value = self._kept[piece.base].clone()
            value[:, list(piece.channels)] = from_bytes(piece.data, piece.dtype, shape).to(self._device)
        if piece.key is not None:
            self._kept[piece.key] = value.clone()
        return value


def _probe(value: Tensor) -> bytes:
    flat = value.reshape(-1)
    return as_bytes(flat[:: max(1, flat.numel() // _PROBES)]).tobytes()


def _changed(before: Tensor, now: Tensor) -> tuple[int, ...]:
    """The channels (dim 1) in which two tensors of one shape differ."""
    differs = (before != now).movedim(1, 0).flatten(1).any(1)
    return tuple(differs.nonzero().flatten().tolist())
