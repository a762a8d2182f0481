"""Weights that several ranks need alike, read from the file once: each rank reads a part, and gets the rest from the
others over the link.

What is read is one stream of bytes, all tensors one after another. A round is a piece of it, of which each rank reads
its share to its device; an all-gather completes the piece on every device, where each rank converts what is in it. The
next round is read meanwhile, into another piece of memory. So the file is read in its order, and each byte of it once.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raylight.parallel.collectives import all_gather_single
from raylight.parallel.process_group import any_rank

from . import staged_read
from .alignment import aligned
from .staged_read import Copy, ReadingStopped, convert, copy_weight

ROUND_BYTES = 128 << 20  # twice of it on each device
VOTE_BYTES = 512 << 20  # read between two agreements whether to stop
_ALIGNMENT = 64  # of tensors in the stream and of shares: no number lies in two
_ADVISED_ROUNDS = 2  # that the system reads ahead


class SharedRead:
    """The copies of one load, which all ranks of a group do together."""

    def __init__(
        self, copies: Sequence[Copy], device: torch.device, group: dist.ProcessGroup | None, names: Sequence[str] = ()
    ) -> None:
        """Prepare to fill all destinations, which are on `device`; `names` tell apart what has the same sizes.

        Raises what a full device raises.
        """
        self._copies = [copy for copy in copies if copy.source.nbytes]
        self._group, self._device = group, device
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        self._starts, self.nbytes = [], 0
        for copy in self._copies:
            self._starts.append(self.nbytes)
            self.nbytes += aligned(copy.source.nbytes, _ALIGNMENT)
        self._share = aligned(-(-min(ROUND_BYTES, self.nbytes) // self._ranks), _ALIGNMENT)
        self._rounds = -(-self.nbytes // self._round) if self.nbytes else 0
        self._staging = [torch.empty(self._round, dtype=torch.uint8, device=device) for _ in range(2)]
        self.fingerprint = self._hash(names)

    @property
    def _round(self) -> int:
        return self._share * self._ranks

    def _hash(self, names: Sequence[str]) -> int:
        """Return a positive number of 62 bits, the same only for ranks that would do the same."""
        what = [
            (tuple(copy.source.shape), str(copy.source.dtype), str(copy.destination.dtype), str(copy.through))
            for copy in self._copies
        ]
        digest = hashlib.blake2b(repr((what, list(names), self._ranks, self._share)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 2 | 1

    def run(self) -> None:
        """Read, exchange and convert. Collective, of ranks with the same `fingerprint`.

        The current stream of the device waits for it, the caller does not. Raises ReadingStopped: on all ranks, when
        the listener of `staged_read` has raised it on one of them.
        """
        lanes = _CudaLanes(self._device) if self._device.type == "cuda" else _NoLanes()
        listener, wants_to_stop, votes = staged_read.listener(), False, 0
        with lanes.joined(), staged_read.reported_to(lambda _: None):
            for index in range(self._rounds):
                begin, turn = index * self._round, index % len(self._staging)
                done = min(begin + self._round, self.nbytes)
                with lanes.reading(turn):
                    self._read_share(begin, self._staging[turn])
                with lanes.spreading(turn):
                    self._spread(begin, self._staging[turn])
                try:
                    if not wants_to_stop:
                        listener(done - begin)
                except ReadingStopped:  # the others would wait for ever
                    wants_to_stop = True
                if done // VOTE_BYTES > votes:
                    votes = done // VOTE_BYTES
                    if any_rank(wants_to_stop, self._group):
                        raise ReadingStopped

    def _read_share(self, begin: int, staging: Tensor) -> None:
        """Read this rank's share of the round from the byte `begin` of the stream into its place in `staging`."""
        first = begin + self._rank * self._share
        for later in range(1, _ADVISED_ROUNDS + 1):
            for copy, start, stop, _ in self._within(first + later * self._round, self._share):
                staged_read.advise(_raw(copy.source)[start:stop])
        for copy, start, stop, at in self._within(first, self._share):
            at += first - begin
            copy_weight(_raw(copy.source)[start:stop], staging[at : at + stop - start])

    def _spread(self, begin: int, staging: Tensor) -> None:
        """Complete a round on every rank, and convert what is in it."""
        own = staging[self._rank * self._share : (self._rank + 1) * self._share]
        all_gather_single(staging, own, group=self._group)
        for copy, start, stop, at in self._within(begin, self._round):
            size = copy.source.itemsize
            into = copy.destination.view(-1)[start // size : stop // size]
            convert(staging[at : at + stop - start].view(copy.source.dtype), into, copy.through)

    def _within(self, begin: int, nbytes: int) -> Iterator[tuple[Copy, int, int, int]]:
        """Return what lies in `nbytes` of the stream from `begin`: a copy, which bytes of it (start, stop), and where
        they are, from `begin`.
        """
        end = min(begin + nbytes, self.nbytes)
        index = max(0, bisect.bisect_right(self._starts, begin) - 1)
        while index < len(self._copies) and self._starts[index] < end:
            copy, at = self._copies[index], self._starts[index]
            start, stop = max(begin - at, 0), min(end - at, copy.source.nbytes)
            if start < stop:
                yield copy, start, stop, at + start - begin
            index += 1


def _raw(tensor: Tensor) -> Tensor:
    """Return the bytes of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8)


class _NoLanes:
    """Of a device that does one thing after another."""

    def joined(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def reading(self, turn: int) -> AbstractContextManager[Any]:
        return nullcontext()

    def spreading(self, turn: int) -> AbstractContextManager[Any]:
        return nullcontext()


class _CudaLanes:
    """Two streams, one for reading and one for what is done with what was read, and two pieces of memory that both use
    in turn.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._read, self._spread = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._filled, self._free = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Begin after what the current stream does now; it waits for the end of both."""
        current = torch.cuda.current_stream(self._device)
        lanes = (self._read, self._spread)
        for lane in lanes:
            lane.wait_stream(current)
        try:
            yield
        finally:
            for lane in lanes:
                current.wait_stream(lane)

    @contextmanager
    def reading(self, turn: int) -> Iterator[None]:
        with torch.cuda.stream(self._read):
            self._read.wait_event(self._free[turn])
            yield
            self._filled[turn].record(self._read)

    @contextmanager
    def spreading(self, turn: int) -> Iterator[None]:
        with torch.cuda.stream(self._spread):
            self._spread.wait_event(self._filled[turn])
            yield
            self._free[turn].record(self._spread)
