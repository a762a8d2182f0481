"""Sequence attention of Raylight, yunchang and xfuser, on the same inputs."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from toy import plain_kernel

from raylight.attention.kernels import kernel
from raylight.parallel.external_strategies import YUNCHANG, ExternalAttention
from raylight.parallel.mesh import MeshShape, build_mesh
from raylight.parallel.partition import offsets, partition
from raylight.parallel.ring import HybridAttention

Errors = dict[str, float]


def _errors(
    world: int, rank: int, tokens: int, heads: int, kv_heads: int, masked: bool, scale: float | None, attentions: dict
) -> Errors:
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(2, heads, tokens, 8, generator=generator)
    k, v = (torch.randn(2, kv_heads, tokens, 8, generator=generator) for _ in range(2))
    mask = torch.randn(2, 1, 1, tokens, generator=generator) if masked else None
    expected = plain_kernel(q, k, v, mask, scale)
    lengths = partition(tokens, world)
    mine = slice(offsets(lengths)[rank], offsets(lengths)[rank] + lengths[rank])
    local = [t[:, :, mine].clone() for t in (q, k, v)]
    return {
        name: (attention(*local, lengths, mask, scale) - expected[:, :, mine]).abs().max().item()
        for name, attention in attentions.items()
    }


def against_yunchang(rank: int, world: int) -> dict[str, tuple[Errors, int]]:
    """Return, for each case, the largest errors and how many calls yunchang has done."""
    mesh = build_mesh(MeshShape(ulysses=world), torch.device("cpu"))
    groups = mesh.get_group("ulysses"), mesh.get_group("ring")
    ours = HybridAttention(*groups)
    theirs = ExternalAttention(YUNCHANG, *groups, ours)
    torch_kernel = kernel("TORCH")
    attentions = {
        name: (lambda *call, strategy=strategy: strategy(torch_kernel, *call))
        for name, strategy in (("ours", ours), ("yunchang", theirs))
    }
    results = {}
    for name, case in {
        "equal pieces": (8 * world, 2 * world, 2 * world, False, None),
        "a scale": (8 * world, world, world, False, 0.2),
        "tokens that do not divide": (8 * world + 1, world, world, False, None),
        "heads that do not divide": (8 * world, world + 1, world + 1, False, None),
        "grouped queries": (8 * world, 2 * world, world, False, None),
        "a mask": (8 * world, world, world, True, None),
    }.items():
        theirs.calls = 0
        results[name] = _errors(world, rank, *case, attentions), theirs.calls
    return results


def against_xfuser(rank: int, world: int) -> Errors:
    """Return the largest errors. xfuser's USP does not initialize without a GPU, so its state is set here."""
    import xfuser.core.distributed.runtime_state as runtime_state
    from xfuser.core.distributed.attention_backend import AttentionBackendType
    from xfuser.model_executor.layers import usp

    mesh = build_mesh(MeshShape(ulysses=world), torch.device("cpu"))
    ulysses, ring = mesh.get_group("ulysses"), mesh.get_group("ring")
    usp.PROCESS_GROUP = SimpleNamespace(ULYSSES_PG=ulysses, RING_PG=ring)
    usp.get_ulysses_parallel_world_size = usp.get_sequence_parallel_world_size = lambda: world
    usp.get_ulysses_parallel_rank = usp.get_sequence_parallel_rank = lambda: rank
    usp.get_ring_parallel_world_size = lambda: 1
    runtime_state._RUNTIME = SimpleNamespace(
        attention_backend=AttentionBackendType.SDPA,
        fp8_comms=None,
        runtime_config=SimpleNamespace(use_spargeattn_head_balance=False),
    )
    ours, torch_kernel = HybridAttention(ulysses, ring), kernel("TORCH")
    return _errors(
        world,
        rank,
        8 * world,
        2 * world,
        2 * world,
        False,
        None,
        {"ours": lambda *call: ours(torch_kernel, *call), "xfuser": lambda q, k, v, *_: usp.USP(q, k, v)},
    )
