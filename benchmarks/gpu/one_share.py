"""A step of one of N ranks, without the others: its tokens through all blocks, its heads over all tokens.

The exchange is Raylight's own but for the collective: what others would send is copied from this rank's tensors, in
the right size, and the bytes are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from measure import between, mark, synchronize
from torch import Tensor

from raylight.attention.kernels import kernel
from raylight.parallel import hooks
from raylight.parallel.collectives import Splits
from raylight.parallel.sequence_parallel import SequenceGroup
from raylight.parallel.ulysses import UlyssesAttention
from raylight.plans import plan_for
from raylight.worker.sequence_parallel import ComfySequenceParallel

_DONE = SimpleNamespace(wait=lambda: True)


@dataclass
class Call:
    """One exchanged attention call, by chunk: bytes received before and after attention, and its seconds."""

    arriving: list[int] = field(default_factory=list)
    returning: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def waits(self, bytes_per_second: float) -> float:
        """Return the seconds in which a GPU only waits for this call's exchange. The link sends one chunk at a time,
        while attention runs that does not need it.
        """
        link = computed = 0.0
        arrived, ended = [], []
        for size in self.arriving:
            link += size / bytes_per_second
            arrived.append(link)
        for at, seconds in zip(arrived, self.seconds, strict=True):
            computed = max(computed, at) + seconds
            ended.append(computed)
        for at, size in zip(ended, self.returning, strict=True):
            link = max(link, at) + size / bytes_per_second
        return link - sum(self.seconds)


class OneShare(UlyssesAttention):
    """Ulysses of rank 0 of `degree`, without the other ranks."""

    def __init__(self, degree: int, large_bytes: int, chunks: int) -> None:
        self._group, self._rank, self._degree = None, 0, degree
        self._large_bytes, self._chunks = large_bytes, chunks
        self.calls: list[Call] = []
        self._events: list[list[tuple[Any, Any]]] = []

    def __call__(self, kernel: Any, *arguments: Any) -> Tensor:
        self.calls.append(Call())
        self._events.append([])

        def timed(q: Tensor, *rest: Any) -> Tensor:
            start, end = mark(q.device), None
            out = kernel(q, *rest)
            end = mark(q.device)
            self._events[-1].append((start, end))
            return out

        return super().__call__(timed, *arguments)

    def finish(self) -> None:
        """Set the seconds of all calls. The device must be idle."""
        for call, events in zip(self.calls, self._events, strict=True):
            call.seconds = [between(start, end) for start, end in events]

    def _exchange(self, sent: Tensor, splits: Splits) -> Tensor:
        # As if every rank had sent what this one sends.
        received = sent.new_empty(sum(splits.receives))
        for start in range(0, received.numel(), sent.numel()):
            piece = received[start : start + sent.numel()]
            piece.copy_(sent.view(-1)[: piece.numel()])
        call = self.calls[-1]
        others = sum(splits.receives[1:]) * sent.element_size()
        (call.returning if self._events[-1] else call.arriving).append(others)
        return received

    def _start(self, sent: Tensor, splits: Splits) -> Any:
        return self._exchange(sent, splits), _DONE


class OneGather:
    """An all-gather as if the other ranks' shards were like this one's; `nbytes` is what the others would send."""

    nbytes = 0

    def __call__(self, local: Tensor, sizes: Sequence[int], dim: int, _: Any) -> Tensor:
        self.nbytes += local.nbytes * (len(sizes) - 1)
        return torch.cat([local.narrow(dim, 0, size) for size in sizes], dim)


@dataclass(frozen=True)
class Share:
    """One step of one rank of `degree`: its seconds, bytes of all-gathers, attention calls, and the peak of its memory
    beyond the replicated weights, in bytes.
    """

    degree: int
    seconds: float
    gathered: int
    calls: list[Call]
    peak: int

    @property
    def received(self) -> int:
        return self.gathered + sum(sum(call.arriving) + sum(call.returning) for call in self.calls)

    def predicted(self, gigabytes_per_second: float) -> float:
        """Return the predicted seconds of a step on `degree` GPUs with a link of this bandwidth."""
        speed = gigabytes_per_second * 1e9
        return self.seconds + self.gathered / speed + sum(call.waits(speed) for call in self.calls)


def share_of(model: Any, inputs: dict[str, Tensor], degree: int, attention: str, large: int, chunks: int) -> Share:
    """Do one step of rank 0 of `degree`."""
    device = inputs["x"].device
    share, gather = OneShare(degree, large, chunks), OneGather()
    group = SequenceGroup(share, degree=degree)
    split = ComfySequenceParallel(model.diffusion_model, plan_for(model.diffusion_model), group)
    options: dict[str, Any] = {}
    split.install(options, kernel(attention, device))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    synchronize(device)
    with torch.inference_mode(), mock.patch.object(hooks, "all_gather", gather):
        start = mark(device)
        model.apply_model(**inputs, transformer_options=options["transformer_options"])
        end = mark(device)
    synchronize(device)
    share.finish()
    split.remove()
    peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else 0
    return Share(degree, between(start, end), gather.nbytes, share.calls, peak)
