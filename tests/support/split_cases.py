"""The ranks' work in tests of sequence parallelism. Importable by name, because ranks are spawned."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import Any

import torch
from counting import CountingKernel, CountingStrategy
from toy import TOY_PLAN, WIDTH, Toy, plain_kernel

from raylight.attention.kernels import kernel as kernel_named
from raylight.parallel import bandwidth
from raylight.parallel.collectives import Splits, all_gather, exchange, start_exchange
from raylight.parallel.mesh import MeshShape, build_mesh, sequence_axis
from raylight.parallel.partition import partition
from raylight.parallel.process_group import any_rank, any_rank_and_smallest, smallest
from raylight.parallel.ring import HybridAttention
from raylight.parallel.sequence_parallel import SequenceGroup, SequenceParallel
from raylight.parallel.shares import ALIKE, Speeds, use
from raylight.parallel.speed_trial import Trial, measure
from raylight.parallel.ulysses import UlyssesAttention


@dataclass(frozen=True)
class Case:
    """Sizes of one run of the toy. `mask` is one of "", "keys", "full", "heads", "2d", "bool"."""

    txt: int = 7
    img: int = 29
    batch: int = 2
    heads: int = 5
    kv_heads: int = 5
    frames: int = 1
    mask: str = ""
    scale: float | None = None


CASES = {
    "odd tokens, odd heads": Case(),
    "batch of one": Case(batch=1),
    "as many tokens as ranks": Case(txt=4, img=4),
    "heads divide": Case(heads=12, kv_heads=12),
    "a scale of its own": Case(scale=0.3),
    "keys masked": Case(mask="keys"),
    "every pair masked": Case(mask="full"),
    "masked by head": Case(mask="heads"),
    "mask without a batch": Case(mask="2d"),
    "boolean mask": Case(mask="bool"),
    "grouped queries": Case(heads=12, kv_heads=6),
    "groups that do not divide": Case(heads=15, kv_heads=3),
    "fewer key heads than ranks": Case(heads=6, kv_heads=1),
    "a text of one token": Case(txt=1),
    "a text of two tokens, one image": Case(txt=2, batch=1, heads=12, kv_heads=6),
    "a text of one token, every pair masked": Case(txt=1, mask="full"),
    "a text of one token, keys masked, grouped queries": Case(txt=1, heads=12, kv_heads=4, mask="keys"),
    "a picture of one token": Case(img=1),
    "a picture of two tokens, masked by head": Case(img=2, mask="heads"),
    "one token of each": Case(txt=1, img=1, mask="full"),
    "two tokens and one, fewer key heads than ranks": Case(txt=2, img=1, heads=6, kv_heads=1, mask="bool"),
    "a text of one token, modulation per frame": Case(txt=1, frames=5),
    "modulation per frame": Case(frames=5),
    "modulation per frame, dividing": Case(img=30, frames=3),
}


def make_mask(case: Case, generator: torch.Generator) -> torch.Tensor | None:
    total = case.txt + case.img
    shapes = {
        "keys": (case.batch, 1, 1, total),
        "full": (case.batch, total, total),
        "2d": (total, total),
        "heads": (1, case.heads, total, total),
        "bool": (case.batch, 1, 1, total),
    }
    if not case.mask:
        return None
    mask = torch.randn(shapes[case.mask], generator=generator)
    return mask > -0.5 if case.mask == "bool" else 2 * mask


def split_toy(
    rank: int, world: int, ring: int = 1, kernel_name: str = "", chunks: int = 1, speeds: Speeds = ALIKE
) -> dict[str, tuple[float, int, int, int]]:
    """Return, for each case, the largest error in standard deviations of the output, the largest number of queries, the
    number of exchanged calls, and the smallest number of heads.

    `ring` ranks are in the ring, the rest in Ulysses. `kernel_name`: the kernel; `plain_kernel` if it is empty. With
    several `chunks`, every exchange is made in chunks, as large ones are. The ranks share the work by `speeds`.
    """
    use(speeds)
    mesh = build_mesh(MeshShape(ring=ring, ulysses=world // ring), torch.device("cpu"))
    group = sequence_axis(mesh).get_group()
    report = {}
    for name, case in CASES.items():
        torch.manual_seed(1)
        model = Toy(case.heads, case.kv_heads).requires_grad_(False)
        generator = torch.Generator().manual_seed(2)

        def draw(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        wide = case.heads * WIDTH
        inputs = {
            "txt": draw(case.batch, case.txt, wide),
            "img": draw(case.batch, case.img, wide),
            "table": draw(1, case.txt + case.img, wide),
            "frames": draw(1, case.frames, wide),
            "context": draw(case.batch, 6, wide),
            "mask": make_mask(case, generator),
            "scale": case.scale,
            "cross_mask": draw(case.batch, 1, case.img, 6),
        }
        copies = {key: t.clone() if torch.is_tensor(t) else t for key, t in inputs.items()}
        expected = model(**copies, attend=plain_kernel)

        strategy = HybridAttention(mesh.get_group("ulysses"), mesh.get_group("ring"))
        if chunks > 1:
            strategy = UlyssesAttention(mesh.get_group("ulysses"), large_bytes=0, chunks=chunks)
        counted = CountingStrategy(strategy)
        split = SequenceParallel(model, TOY_PLAN, SequenceGroup.of(group, counted))
        kernel = CountingKernel(kernel_named(kernel_name) if kernel_name else plain_kernel)
        queries: list[int] = []

        def attend(q, *rest, split=split, kernel=kernel, queries=queries):
            queries.append(q.shape[2])
            return split.attention(kernel, q, *rest)

        for _ in range(2):  # the second forward must not remember the first
            actual = model(**inputs, attend=attend)
        split.remove()
        error = ((actual - expected).abs().max() / expected.std()).item()
        report[name] = (error, max(queries), counted.calls, min(kernel.heads))
    return report


def uneven_collectives(rank: int, world: int) -> bool:
    """Check that an all-gather and an exchange of uneven sizes give every rank the right elements."""
    sizes = partition(world + 1, world)
    start = sum(sizes[:rank])
    whole = torch.arange((world + 1) * 6.0).view(2, world + 1, 3)
    gathered = all_gather(whole[:, start : start + sizes[rank]], sizes, 1, torch.distributed.group.WORLD)
    assert torch.equal(gathered, whole)

    # Rank s sends (s + 1) * (d + 1) elements to rank d.
    counts = [(rank + 1) * (other + 1) for other in range(world)]
    sent = torch.cat([torch.full((count,), 10.0 * rank + other) for other, count in enumerate(counts)])
    splits = Splits(tuple(counts), tuple(counts))
    received, work = start_exchange(sent, splits, torch.distributed.group.WORLD)
    work.wait()
    for result in (received, exchange(sent, splits, torch.distributed.group.WORLD)):
        for source, block in enumerate(result.split(counts)):
            assert torch.equal(block, torch.full_like(block, 10.0 * source + rank))
    even = Splits((3,) * world, (3,) * world, equal=True)
    received = exchange(torch.arange(3.0 * world) + 100 * rank, even, torch.distributed.group.WORLD)
    assert received.tolist() == [100 * source + 3 * rank + index for source in range(world) for index in range(3)]
    return True


def chunks_by_links(rank: int, world: int) -> list[int]:
    """In how many chunks a large exchange is made: over links not measured, fast, slow, and slow only to others."""
    group, found = torch.distributed.group.WORLD, []
    inside = {pair: 200e9 for pair in itertools.combinations(range(world), 2)}
    for speeds in ({}, inside, inside | {(0, world - 1): 20e9}, inside | {(0, world): 20e9}):
        bandwidth.use(bandwidth.Links(True, 1e-5, speeds) if speeds else None)
        strategy, kernel = UlyssesAttention(group, large_bytes=0), CountingKernel(plain_kernel)
        q = torch.randn(1, 2 * world, 3, WIDTH)
        strategy(kernel, q, q, q, (3,) * world, None, None)
        found.append(len(kernel.heads))
    bandwidth.use(None)
    return found


def votes(rank: int, world: int) -> tuple[Any, ...]:
    """Return whether one rank's flag, and no flag, reach all ranks, and the smallest number; and both at once."""
    apart = any_rank(rank == world - 1), any_rank(False), smallest(100 - rank)
    together = any_rank_and_smallest(rank == world - 1, 100 - rank), any_rank_and_smallest(False, rank - 1)
    return *apart, *together


def speed_on_the_cpu(rank: int, world: int) -> Trial:
    """Return what this rank found in a trial of all."""
    return measure(torch.device("cpu"))


def one_rank_fails(rank: int, world: int, how: str) -> None:
    """Fail on rank 1 inside a forward, while the others are in an exchange with it."""
    if rank == 1:
        if how == "dies":
            os._exit(3)
        raise RuntimeError("simulated fault")
    split_toy(rank, world)
