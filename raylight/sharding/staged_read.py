"""Copies of weights from a mapped file to a GPU: through pinned buffers, and converted there.

PyTorch's own copy of pageable memory to a GPU reaches a third to a half of this speed. It also converts on the CPU
first, into a copy of the weight in memory of the process.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .alignment import aligned

SLOTS, SLOT_BYTES = 8, 16 << 20  # of pinned memory
_SMALL_BYTES = 1 << 20  # below it more threads, or advice to the system, cost more than they save
_THREADS = 8  # that fill a slot: one core copies slower than a GPU takes
_ALIGNMENT = 64  # of what shares a slot
_WILL_NEED = 3  # MADV_WILLNEED of Linux


class ReadingStopped(Exception):
    """A rank reads no further, as it or another was asked to cancel. It has yet to agree on that with the others."""


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy to be done: `destination` (contiguous, on any device) is filled from `source` (contiguous, on the CPU, of
    the same shape) by way of the dtypes `through`.
    """

    source: Tensor
    destination: Tensor
    through: tuple[torch.dtype, ...]


Listener = Callable[[int], None]
"""Called with the bytes that were read; what it raises ends the reading."""

_listener: Listener | None = None
_collected: list[Copy] | None = None
_readers: dict[torch.device, _Reader] = {}


@contextmanager
def reported_to(listener: Listener) -> Iterator[None]:
    """Call `listener` for all that is read within this context."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def listener() -> Listener:
    """Return what is called for all that is read now."""
    return _listener or (lambda _: None)


@contextmanager
def collected() -> Iterator[list[Copy]]:
    """Within it `copy_weight` copies nothing, but for tensors with gaps, and adds what it was to copy to this list."""
    global _collected
    before, _collected = _collected, []
    try:
        yield _collected
    finally:
        _collected = before


def copy_weight(source: Tensor, destination: Tensor, through: Sequence[torch.dtype] = ()) -> None:
    """Fill `destination` from `source`, a plain tensor of the same shape, by way of the dtypes `through`. It is one of
    a mapped file as a rule; one that is on a GPU already, as a benchmark's, is only converted.

    On a GPU nothing is converted, or kept, in system memory. The current stream of the GPU waits for the copy, the
    caller does not. Raises what a listener of `reported_to` raises.
    """
    is_there = source.device.type == "cuda"  # in a benchmark, whose random weights are
    if _collected is not None and not is_there and source.is_contiguous() and destination.is_contiguous():
        _collected.append(Copy(source, destination, tuple(through)))
        return
    if destination.device.type != "cuda" or is_there:
        # First to the device as it is: a copy to another dtype may be converted here.
        convert(source.to(destination.device), destination, through)
        _report(source.nbytes)
    elif destination.is_contiguous():
        _reader(destination.device).copy(source.contiguous(), destination, through)
    else:
        dense = torch.empty(source.shape, dtype=destination.dtype, device=destination.device)
        _reader(destination.device).copy(source.contiguous(), dense, through)
        destination.copy_(dense)


def advise(source: Tensor) -> None:
    """Have the system read a plain tensor of a mapped file from the disk, without waiting for it. Does nothing where
    the system cannot do that.
    """
    if source.nbytes < _SMALL_BYTES or _madvise is None:
        return
    start = source.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    _madvise(start, source.data_ptr() + source.nbytes - start, _WILL_NEED)


def release() -> None:
    """Free the buffers; the next copy makes them again."""
    for reader in _readers.values():
        reader.close()
    _readers.clear()


def _reader(device: torch.device) -> _Reader:
    if device not in _readers:
        _readers[device] = _Reader(device)
    return _readers[device]


def _report(nbytes: int) -> None:
    if _listener is not None:
        _listener(nbytes)


def convert(source: Tensor, destination: Tensor, through: Sequence[torch.dtype]) -> None:
    """Fill `destination` from `source`, of the same shape and on the same device, by way of the dtypes `through`."""
    for dtype in through:
        source = source.to(dtype)
    destination.copy_(source, non_blocking=True)


def _find_madvise() -> Callable[[int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):  # no Linux
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


_madvise = _find_madvise()


class _Reader:
    """Slots of pinned memory, which are filled and sent to one GPU in turn, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # they are used in every mode
            self._slots = [torch.empty(SLOT_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(SLOTS)]
        self._sent = [torch.cuda.Event() for _ in self._slots]
        self._turn, self._used = 0, 0
        self._stream = torch.cuda.Stream(device)
        self._scratch: Tensor | None = None  # on the GPU, for what is converted
        self._threads = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "raylight-read")

    def copy(self, source: Tensor, destination: Tensor, through: Sequence[torch.dtype]) -> None:
        """As `copy_weight`, both contiguous."""
        advise(source)
        current = torch.cuda.current_stream(destination.device)
        self._stream.wait_stream(current)  # what used this memory before
        try:
            start = 0
            while start < source.nbytes:
                start += self._copy_part(source, destination, through, start)
        finally:
            current.wait_stream(self._stream)

    def _copy_part(self, source: Tensor, destination: Tensor, through: Sequence[torch.dtype], start: int) -> int:
        """Copy as much of the source, from its byte `start`, as the slot has room for; return how many bytes."""
        if self._used == SLOT_BYTES:
            self._turn, self._used = (self._turn + 1) % SLOTS, 0
            self._sent[self._turn].synchronize()
        nbytes = min(source.nbytes - start, SLOT_BYTES - self._used)
        room = self._slots[self._turn][self._used : self._used + nbytes]
        self._used = min(SLOT_BYTES, aligned(self._used + nbytes, _ALIGNMENT))
        self._fill(room, source.data_ptr() + start)
        into = destination.view(-1)[start // source.itemsize : (start + nbytes) // source.itemsize]
        with torch.cuda.stream(self._stream):
            if source.dtype == destination.dtype and not through:
                into.view(torch.uint8).copy_(room, non_blocking=True)
            else:
                raw = self._on_device(destination.device)[:nbytes]
                raw.copy_(room, non_blocking=True)
                convert(raw.view(source.dtype), into, through)
            self._sent[self._turn].record(self._stream)
        _report(nbytes)
        return nbytes

    def _on_device(self, device: torch.device) -> Tensor:
        """Return memory for a slot on the GPU. One is enough: the stream converts what is there before it goes on."""
        if self._scratch is None:
            with torch.inference_mode(False):
                self._scratch = torch.empty(SLOT_BYTES, dtype=torch.uint8, device=device)
        return self._scratch

    def _fill(self, room: Tensor, address: int) -> None:
        """Copy memory from `address`, in parts at once: PyTorch has one thread for each operation in a worker."""
        if room.nbytes < _SMALL_BYTES:
            ctypes.memmove(room.data_ptr(), address, room.nbytes)
            return
        part = -(-room.nbytes // _THREADS)
        copies = [  # without Python's lock
            self._threads.submit(ctypes.memmove, room.data_ptr() + at, address + at, min(part, room.nbytes - at))
            for at in range(0, room.nbytes, part)
        ]
        for copy in copies:
            copy.result()

    def close(self) -> None:
        """End the threads. The memory is freed with this object, when nothing is being sent any more."""
        for sent in self._sent:
            sent.synchronize()
        self._threads.shutdown()
