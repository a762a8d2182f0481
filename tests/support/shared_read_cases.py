"""Weights that ranks read together, run on every rank. `worker/test_reading_together.py` and
`sharding/test_shared_read.py` have the claims.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from comfy.cli_args import args

args.cpu = not torch.cuda.is_available()  # before ComfyUI picks a device

from torch import Tensor

from raylight.host.checkpoint import load_mapped
from raylight.parallel import bandwidth
from raylight.parallel.bandwidth import Links
from raylight.parallel.heartbeat import cancellation_checked_by
from raylight.parallel.process_group import any_rank
from raylight.sharding import shared_read, staged_read
from raylight.sharding.shared_read import SharedRead
from raylight.sharding.staged_read import Copy, ReadingStopped
from raylight.worker import reading_together
from raylight.worker.patcher import mode_of
from raylight.worker.replicated_patcher import ReplicatedPatcher, build_replicated

CPU, GPU = torch.device("cpu"), torch.device("cpu", 0)  # the CPU by its number is used as a GPU
FAST = Links(True, 1e-5, {(0, 1): 1e11})
FORMS: tuple[tuple[torch.dtype, torch.dtype, tuple[torch.dtype, ...]], ...] = (
    (torch.bfloat16, torch.bfloat16, ()),
    (torch.bfloat16, torch.float16, ()),
    (torch.float32, torch.float8_e4m3fn, (torch.bfloat16,)),
    (torch.float8_e5m2, torch.float32, ()),
    (torch.uint8, torch.uint8, ()),
)
SIZES = ((), (1,), (7, 5), (64, 64), (0, 3), (1000,), (33, 129))


def copies() -> list[Copy]:
    """Copies of every size in every form, and two over each other: the later one counts."""
    generator, found = torch.Generator().manual_seed(3), []
    for stored, own, through in FORMS:
        for size in SIZES:
            source = torch.randint(0, 100, size, generator=generator).to(stored)
            found.append(Copy(source, torch.full(size, 9).to(own), through))
    over = torch.ones(40)
    return [*found, Copy(torch.rand(40, generator=generator), over, ()), Copy(torch.full((20,), 5.0), over[10:30], ())]


def small_rounds(round_bytes: int) -> None:
    """Exchange this much at once, and agree after each time."""
    shared_read.ROUND_BYTES = shared_read.VOTE_BYTES = round_bytes


def read_all(rank: int, world: int, round_bytes: int) -> tuple[bool, int, int, int]:
    """Whether all destinations have what a rank alone puts there; the bytes that this rank has read, of how many; and
    what its listener was told.
    """
    small_rounds(round_bytes)
    together, alone, told = copies(), copies(), []
    for copy in alone:
        staged_read.copy_weight(copy.source, copy.destination, copy.through)
    read = counted_reads()
    reading = SharedRead(together, CPU, None)
    with staged_read.reported_to(told.append):
        reading.run()
    same = all(
        torch.equal(one.destination.view(-1).view(torch.uint8), other.destination.view(-1).view(torch.uint8))
        for one, other in zip(together, alone, strict=True)
    )
    return same, sum(read), sum(copy.source.nbytes for copy in together), sum(told) - reading.nbytes


def counted_reads() -> list[int]:
    """A list to which the bytes of each read of a share are added from now on."""
    read: list[int] = []
    before = shared_read.copy_weight

    def counting(source: Tensor, destination: Tensor) -> None:
        read.append(source.nbytes)
        before(source, destination)

    shared_read.copy_weight = counting
    return read


def stopped(rank: int, world: int) -> tuple[bool, bool]:
    """Whether the read of every rank ends where one is asked to cancel, before its end; and whether ranks are in step
    then.
    """
    small_rounds(1 << 10)
    told: list[int] = []

    def listen(nbytes: int) -> None:
        told.append(nbytes)
        if rank == world - 1 and len(told) == 3:
            raise ReadingStopped

    reading, has_stopped = SharedRead(copies(), CPU, None), False
    try:
        with staged_read.reported_to(listen):
            reading.run()
    except ReadingStopped:
        has_stopped = True
    return has_stopped and sum(told) < reading.nbytes, any_rank(rank == 0)


def fingerprints(rank: int, world: int) -> list[bool]:
    """Whether each change gives another fingerprint, and none the same."""
    names = ["a", "b"]
    first, second = (Copy(torch.zeros(8), torch.zeros(8), ()) for _ in range(2))
    usual = SharedRead([first, second], CPU, None, names).fingerprint
    others = [
        ([second], names),
        ([first, second], ["b", "a"]),
        ([first, Copy(second.source, torch.zeros(8).half(), ())], names),
        ([first, Copy(torch.zeros(4, 2), torch.zeros(4, 2), ())], names),
        ([first, Copy(second.source, second.destination, (torch.bfloat16,))], names),
    ]
    assert usual == SharedRead([first, second], CPU, None, names).fingerprint and 0 < usual < 1 << 62
    return [SharedRead(changed, CPU, None, of).fingerprint != usual for changed, of in others]


class Cancelled(BaseException):
    """What the ranks raise together where one was asked to cancel."""


def loads(rank: int, world: int, path: Path, dtype: torch.dtype | None) -> dict[str, tuple[bool, bool]]:
    """For each way in which ranks load: whether this rank has then the weights that it reads alone, where it was to
    load them, and whether it has read less than all of them itself.
    """
    small_rounds(1 << 16)
    found = {}
    with mode_of("replicated"):
        options = {} if dtype is None else {"dtype": dtype}
        wanted, model = built(path, options), built(path, options)
        in_file, full = wanted._bytes_to_read(GPU), wanted.model_size()
        wanted.partially_load(GPU, 10**12)
        bandwidth.use(FAST)
        read = counted_reads()

        def measure(way: str, load: Callable[[], Any]) -> None:
            read.clear()
            load()
            loaded = model.loaded_size() == full
            found[way] = not loaded or equal(model, wanted), 0 < sum(read) < in_file
            model.detach()

        measure("fresh", lambda: model.partially_load(GPU, 10**12))
        measure("again", lambda: model.partially_load(GPU, 10**12))
        measure("one in part", lambda: model.partially_load(GPU, 10**12 if rank else full // 2))
        measure("after that", lambda: model.partially_load(GPU, 10**12))
        measure("one out of memory", lambda: out_of_memory(model, rank == 0))
        measure("one cancels", lambda: cancelled(model, rank == 1))
        measure("one has it already", lambda: twice_on_one(model, rank == 0))
        bandwidth.use(Links(True, 1e-5, {(0, 1): 1e9}))
        measure("slow link", lambda: model.partially_load(GPU, 10**12))
        bandwidth.use(None)
    return found


def built(path: Path, options: dict[str, Any]) -> ReplicatedPatcher:
    patcher, _ = build_replicated(load_mapped(str(path), dict(options)), CPU, in_file=True)
    patcher.load_device = GPU
    return patcher


def equal(one: ReplicatedPatcher, other: ReplicatedPatcher) -> bool:
    values = [dict(patcher.model.named_parameters()) for patcher in (one, other)]
    return all(
        torch.equal(value.contiguous().view(-1).view(torch.uint8), values[1][name].view(-1).view(torch.uint8))
        for name, value in values[0].items()
    )


def out_of_memory(model: ReplicatedPatcher, here: bool) -> None:
    """Load where one rank has no memory to exchange weights."""
    before = reading_together.SharedRead
    if here:

        def refuse(*_: Any) -> SharedRead:
            raise MemoryError

        reading_together.SharedRead = refuse
    model.partially_load(GPU, 10**12)
    reading_together.SharedRead = before


def cancelled(model: ReplicatedPatcher, here: bool) -> None:
    """Load while one rank is asked to cancel in the middle of the read: all end it."""

    def agree() -> None:
        if any_rank(here):
            raise Cancelled

    count = 0

    def listen(_: int) -> None:
        nonlocal count
        count += 1
        if here and count == 2:
            raise ReadingStopped

    try:
        with cancellation_checked_by(agree), staged_read.reported_to(listen):
            model.partially_load(GPU, 10**12)
    except Cancelled:
        assert model.loaded_size() == 0
        return
    raise AssertionError("it was not cancelled")


def twice_on_one(model: ReplicatedPatcher, here: bool) -> None:
    """Load where one rank has all weights on its GPU already."""
    if here:
        bandwidth.use(None)  # it loads alone: others do nothing
        model.partially_load(GPU, 10**12)
        bandwidth.use(FAST)
    model.partially_load(GPU, 10**12)


def loads_on_gpus(rank: int, world: int, path: Path, dtypes: list[torch.dtype]) -> dict[str, tuple[bool, bool, float]]:
    """For each dtype and way on real GPUs: whether the weights are those that a rank reads alone, whether all ranks
    have read them together, and how many bytes of the GPU are still taken when they have left it, of theirs.
    """
    device, found = torch.device("cuda", rank), {}
    together: list[int] = []  # bytes: the reading itself would hold its memory
    before = reading_together.SharedRead.run

    def run(reading: SharedRead) -> None:
        together.append(reading.nbytes)
        before(reading)

    reading_together.SharedRead.run = run
    with mode_of("replicated"):
        for dtype in dtypes:
            alone, model = (build_replicated(load_mapped(str(path), {"dtype": dtype}), CPU, True)[0] for _ in range(2))
            bandwidth.use(None)
            alone.partially_load(device, 10**12)
            bandwidth.use(FAST)
            held = torch.cuda.memory_allocated(device)
            for way in ("fresh", "again", "once more"):
                together.clear()
                model.partially_load(device, 10**12)
                assert model.loaded_size() == model.model_size()
                same = equal(model, alone)
                model.detach()
                left = torch.cuda.memory_allocated(device) - held
                found[f"{dtype}, {way}"] = same, len(together) == 1, left / model.model_size()
            alone.detach()
    return found
