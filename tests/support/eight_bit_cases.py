"""The ranks' work in tests of exchanges in 8 bits. Importable by name, because ranks are spawned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from toy import plain_kernel

from raylight.attention.kernels import kernel as kernel_named
from raylight.parallel.eight_bit_ulysses import EightBitUlysses
from raylight.parallel.exchange_error import ErrorMeter, MeasuredAttention, hybrid_attention
from raylight.parallel.mesh import MeshShape, build_mesh
from raylight.parallel.partition import offsets, partition
from raylight.parallel.sequence_attention import Strategy
from raylight.parallel.ulysses import UlyssesAttention

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Call:
    """Sizes of one attention call. `mask` is "", "keys" or "full"."""

    tokens: int = 48
    batch: int = 1
    heads: int = 12
    kv_heads: int = 12
    width: int = 64
    mask: str = ""
    scale: float | None = None
    dtype: torch.dtype = torch.float32


CALLS = {
    "float32": Call(),
    "bfloat16": Call(dtype=torch.bfloat16),
    "float16, two rows": Call(dtype=torch.float16, batch=2),
    "odd tokens, odd heads": Call(tokens=47, heads=5, kv_heads=5, batch=2),
    "grouped queries": Call(kv_heads=6, batch=2),
    "groups that do not divide": Call(heads=15, kv_heads=3),
    "an odd head size": Call(width=37, tokens=49),
    "keys masked": Call(mask="keys", batch=2, scale=0.2),
    "every pair masked": Call(mask="full", tokens=31),
    "fewer tokens than ranks": Call(tokens=2, batch=2),
}


@dataclass(frozen=True)
class Outcome:
    """Of one call on one rank: the relative L2 of its result in 8 bits and by an exact exchange, both to one process,
    and the bytes that each sent.
    """

    error: float
    exact_error: float
    sent_bytes: int
    exact_bytes: int


@contextmanager
def sent() -> Iterator[list[int]]:
    """Within it, note the bytes that this rank gives to each collective."""
    found: list[int] = []
    all_to_all, between = dist.all_to_all_single, dist.batch_isend_irecv

    def counted(output: Tensor, data: Tensor, *rest: Any, **named: Any) -> Any:
        found.append(data.nbytes)
        return all_to_all(output, data, *rest, **named)

    def passed(operations: list[dist.P2POp]) -> Any:
        found.extend(one.tensor.nbytes for one in operations if one.op is dist.isend)
        return between(operations)

    dist.all_to_all_single, dist.batch_isend_irecv = counted, passed
    try:
        yield found
    finally:
        dist.all_to_all_single, dist.batch_isend_irecv = all_to_all, between


def drawn(call: Call, device: torch.device = CPU) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return q, k, v and the mask of a call over all tokens."""
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(call.dtype).to(device)

    q = draw(call.batch, call.heads, call.tokens, call.width)
    k, v = (draw(call.batch, call.kv_heads, call.tokens, call.width) for _ in range(2))
    shapes = {"keys": (call.batch, 1, 1, call.tokens), "full": (1, 1, call.tokens, call.tokens)}
    return q, k, v, draw(*shapes[call.mask]) if call.mask else None


def relative(actual: Tensor, expected: Tensor) -> float:
    norm = expected.float().norm().item()
    return ((actual.float() - expected.float()).norm() / norm).item() if norm else 0.0


def outcomes(rank: int, world: int, ring: int = 1, chunks: int = 1, on: str = "cpu") -> dict[str, Outcome]:
    """Return what each call gives. `ring` ranks are in the ring, the rest in Ulysses; exchanges in `chunks`."""
    device = torch.device(on, rank if on == "cuda" else 0)
    mesh = build_mesh(MeshShape(ring=ring, ulysses=world // ring), device)
    groups = mesh.get_group("ulysses"), mesh.get_group("ring")
    exact, in_8_bits = hybrid_attention(*groups, None), hybrid_attention(*groups, ErrorMeter())
    if chunks > 1:
        exact, in_8_bits = (of(groups[0], large_bytes=0, chunks=chunks) for of in (UlyssesAttention, EightBitUlysses))
    kernel = kernel_named("TORCH") if ring > 1 else plain_kernel
    return {name: _outcome(rank, world, call, device, exact, in_8_bits, kernel) for name, call in CALLS.items()}


def _outcome(
    rank: int,
    world: int,
    call: Call,
    device: torch.device,
    exact: Strategy,
    in_8_bits: Strategy,
    kernel: Callable[..., Tensor],
) -> Outcome:
    q, k, v, mask = drawn(call, device)
    lengths = partition(call.tokens, world)
    first = offsets(lengths)[rank]
    mine = slice(first, first + lengths[rank])
    expected = plain_kernel(*(t.float() for t in (q, k, v)), None if mask is None else mask.float(), call.scale)
    local = [t[:, :, mine].clone() for t in (q, k, v)]
    copies = [t.clone() for t in local]
    errors, sizes = [], []
    for strategy in (in_8_bits, exact):
        with sent() as found:
            result = strategy(kernel, *local, lengths, mask, call.scale)
        assert result.dtype == call.dtype and result.shape == local[0].shape
        errors.append(relative(result, expected[:, :, mine]))
        sizes.append(sum(found))
    assert all(torch.equal(one, other) for one, other in zip(local, copies, strict=True)), "inputs have changed"
    return Outcome(*errors, *sizes)


def measured(rank: int, world: int, ring: int) -> tuple[str, list[int], float]:
    """Return what a meter says of 9 calls in one forward, which of them made exchanges twice, and the true error of
    the result of the first call.
    """
    mesh = build_mesh(MeshShape(ring=ring, ulysses=world // ring), torch.device("cpu"))
    meter = ErrorMeter()
    strategy = hybrid_attention(mesh.get_group("ulysses"), mesh.get_group("ring"), meter)
    assert isinstance(strategy, MeasuredAttention)
    call = CALLS["odd tokens, odd heads"]
    q, k, v, _ = drawn(call)
    lengths = partition(call.tokens, world)
    mine = slice(offsets(lengths)[rank], offsets(lengths)[rank] + lengths[rank])
    local = [t[:, :, mine] for t in (q, k, v)]
    meter.begin()
    assert meter.begins_forward(), "the first forward"
    counts, result = [], None
    for _ in range(9):
        with sent() as found:
            result = strategy(kernel_named("TORCH"), *local, lengths, None, None)
        counts.append(len(found))
    assert not meter.begins_forward(), "the second forward"
    with sent() as found:
        strategy(kernel_named("TORCH"), *local, lengths, None, None)
    counts.append(len(found))
    exact = strategy.exact(kernel_named("TORCH"), *local, lengths, None, None)
    error = meter.end()
    assert error is not None and meter.end() is None
    assert abs(error.result - relative(result, exact)) < 1e-6 and error.calls == 4
    return str(error), [count // min(counts) for count in counts], error.inputs


def unmeasured(rank: int, world: int) -> Sequence[bool]:
    """Return whether there is an error to tell: without a run, of a run without calls, and on a rank without tokens."""
    mesh = build_mesh(MeshShape(ulysses=world), torch.device("cpu"))
    meter = ErrorMeter()
    strategy = hybrid_attention(mesh.get_group("ulysses"), mesh.get_group("ring"), meter)
    lengths = (4, *[0] * (world - 1))
    q = torch.randn(1, world, lengths[rank], 8)
    found = []
    for begins, calls in ((False, 1), (True, 0), (True, 1)):
        if begins:
            meter.begin()
        for _ in range(calls):
            strategy(plain_kernel, q, q, q, lengths, None, None)
        found.append(meter.end() is not None)
    return found


def compiled(rank: int, world: int) -> tuple[bool, int]:
    """Return whether a compiled call gives what one that is not compiled does, and how many of 3 calls were measured.
    Ranks have unlike numbers of tokens, for which they compile apart.
    """
    mesh = build_mesh(MeshShape(ulysses=world), torch.device("cpu"))
    meter = ErrorMeter()
    strategy = hybrid_attention(mesh.get_group("ulysses"), mesh.get_group("ring"), meter)
    q, k, v, _ = drawn(CALLS["odd tokens, odd heads"])
    found = []

    def block(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
        return strategy(plain_kernel, q * 1.5, k, v, lengths, None, None) + 1

    with torch.no_grad():
        call = torch.compile(block, backend="eager")
        meter.begin()
        for total in (47, 46, 45):
            lengths = partition(total, world)
            mine = slice(offsets(lengths)[rank], offsets(lengths)[rank] + lengths[rank])
            local = [t[:, :, mine].clone() for t in (q, k, v)]
            found.append((call(*local, lengths), local, lengths))
        error = meter.end()
        equal = all(torch.equal(result, block(*local, lengths)) for result, local, lengths in found)
    return equal, 0 if error is None else error.calls
