"""ComfyUI's own decode and encode of every VAE against the ones split by rows, in the same processes."""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from comfy.cli_args import args

args.cpu = True  # before ComfyUI picks a device

from raylight.dev.vae_zoo import VAES, with_random_weights
from raylight.parallel.shares import ALIKE, Speeds, use
from raylight.worker.parallel_vae import apply_row_parallel


@dataclass(frozen=True)
class Comparison:
    """One rank's measurement of one direction. `share` is of the rows of all convolutions' inputs, halos included."""

    error: float = 1.0
    std: float = 0.0
    rows: tuple[int, int] = (0, 0)
    total: int = 0
    share: float = 1.0
    halo_bytes: int = 0
    whole_again: bool = False
    failure: str = ""


def compare(rank: int, world: int, names: Sequence[str], speeds: Speeds = ALIKE) -> dict[tuple[str, str], Comparison]:
    """Compare decode and encode of the named VAEs on all ranks; a failure on any rank ends its VAE on all.

    The ranks share the rows by `speeds`.
    """
    use(speeds)
    results = {}
    for name in names:
        tiny = VAES[name]
        torch.manual_seed(0)
        model = with_random_weights(tiny.build())
        for direction, shape in (("decode", tiny.latent), ("encode", tiny.image)):
            given = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            expected: list[torch.Tensor | None] = [None]
            if rank == 0:
                expected = [_run(getattr(model, direction), given)]
            dist.broadcast_object_list(expected)
            assert expected[0] is not None
            try:
                results[name, direction] = _compare(model, direction, given, expected[0])
            except Exception:
                # All ranks meet it, or lose their connections by the end of the first.
                results[name, direction] = Comparison(failure=traceback.format_exc())
    return results


def _run(method: Callable[[torch.Tensor], torch.Tensor], given: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        torch.manual_seed(7)  # some add noise
        return method(given.clone())


def _compare(model: torch.nn.Module, direction: str, given: torch.Tensor, expected: torch.Tensor) -> Comparison:
    parallel = apply_row_parallel(model, dist.group.WORLD)
    # Both ways, on one number of ranks or another.
    parallel.counts.orders_any = dist.get_world_size() % 2 == 1
    parallel.counts.hides_halos_from = 0 if dist.get_world_size() % 2 else math.inf
    try:
        actual = _run(getattr(model, direction), given)
    finally:
        parallel.remove()
    start, stop = parallel.rows(expected.shape[-2])
    counts = parallel.counts
    return Comparison(
        ((actual - expected[..., start:stop, :]).abs().max() / expected.std()).item(),
        expected.std().item(),
        (start, stop),
        expected.shape[-2],
        counts.convolved_rows / max(1, counts.convolved_of),
        parallel.halo_bytes,
        direction in vars(model),
    )


def compare_with_other_memory(rank: int, world: int, name: str, function: str) -> Comparison:
    """Decode a video with ranks whose GPUs have other sizes: `function`, of the class's module, differs by rank."""
    torch.manual_seed(0)
    model: Any = with_random_weights(VAES[name].build())
    code: Any = sys.modules[type(model).__module__]
    latent = torch.randn(VAES[name].latent, generator=torch.Generator().manual_seed(1))
    expected = _run(model.decode, latent)
    before = getattr(code, function)
    setattr(code, function, lambda *_: 1 << 12 if rank == 0 else 1 << 40)
    try:
        return _compare(model, "decode", latent, expected)
    finally:
        setattr(code, function, before)
