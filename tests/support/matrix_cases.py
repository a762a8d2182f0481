"""ComfyUI's own `apply_model` of a family against the split model's, in the same processes."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from comfy.cli_args import args
from counting import CountingStrategy

args.cpu = True  # before ComfyUI picks a device

from raylight.attention.kernels import kernel
from raylight.dev.zoo import families
from raylight.dev.zoo.family import Draw, Family
from raylight.parallel.mesh import MeshShape, build_mesh
from raylight.parallel.ring import HybridAttention
from raylight.parallel.shares import ALIKE, Speeds, use
from raylight.plans import plan_for
from raylight.worker.forward_kinds import copied
from raylight.worker.sequence_parallel import apply_sequence_parallel

T = TypeVar("T")
Calls = Mapping[str, Callable[[Draw], dict[str, Any]]]


@dataclass(frozen=True)
class Comparison:
    """One rank's measurement of one call. `heads`, of all `of`, are those of exchanged attention calls on this rank."""

    error: float
    std: float
    exchanged: int
    largest_share: float
    heads: int
    of: int
    failure: str = ""


def compare(
    rank: int,
    world: int,
    names: tuple[str, ...],
    shapes: dict[str, MeshShape],
    calls_of: Callable[[Family], Calls] = attrgetter("calls"),
    speeds: Speeds = ALIKE,
) -> dict[tuple[str, str, str], Comparison]:
    """Compare every call of the named families on each of these meshes of `world` ranks, by family, call and mesh. The
    ranks share the work by `speeds`.

    Each rank builds a family once, and rank 0 computes the expected output for all before the model is split.
    """
    use(speeds)
    meshes = {name: build_mesh(shape, torch.device("cpu")) for name, shape in shapes.items()}
    results = {}
    for name in names:
        family = families()[name]
        model, calls = family.build(), calls_of(family)
        untouched = [
            {call: _attempt(partial(_untouched, model, make)) for call, make in calls.items()} if rank == 0 else None
        ]
        dist.broadcast_object_list(untouched)
        for call, expected in untouched[0].items():
            for mesh_name, mesh in meshes.items():
                # The test of this call reports a failure; one before any exchange affects no other call.
                found = (
                    expected
                    if isinstance(expected, str)
                    else _attempt(partial(_compare, model, calls[call], mesh, expected))
                )
                results[name, call, mesh_name] = (
                    found if isinstance(found, Comparison) else Comparison(1.0, 0.0, 0, 1.0, 0, 0, found)
                )
    return results


def _attempt(measure: Callable[[], T]) -> T | str:
    """Return the result of `measure`, or the traceback of what it raised."""
    try:
        with torch.inference_mode():
            return measure()
    except Exception:
        return traceback.format_exc()


def _untouched(model: torch.nn.Module, make: Any) -> torch.Tensor:
    """Return the output of the model that is not split."""
    inputs = make(Draw(3))
    options = inputs.pop("transformer_options", {})
    expected = model.apply_model(**copied(inputs), transformer_options=dict(options))
    if options:
        bare = model.apply_model(**copied(inputs), transformer_options={})
        assert (bare - expected).abs().max() > 0.1 * bare.std(), "the model does not call these patches"
    return expected


def _compare(model: torch.nn.Module, make: Any, mesh: Any, expected: torch.Tensor) -> Comparison:
    inputs = make(Draw(3))
    options = inputs.pop("transformer_options", {})
    parallel = Split(model.diffusion_model, mesh)
    try:
        actual = model.apply_model(**copied(inputs), transformer_options=parallel.options(options))
    finally:
        parallel.remove()
    counts = parallel.counts
    return Comparison(
        ((actual - expected).abs().max() / expected.std()).item(),
        expected.std().item(),
        counts.calls,
        counts.largest_share,
        max(counts.heads, default=0),
        parallel.heads,
    )


class Split:
    """A diffusion model of `heads` attention heads, split as a worker splits it; `counts` are of its exchanges."""

    def __init__(self, model: torch.nn.Module, mesh: Any) -> None:
        plan = plan_for(model)
        self.heads = plan.heads_of(model)
        self.counts = CountingStrategy(HybridAttention(mesh.get_group("ulysses"), mesh.get_group("ring")))
        self._parallel = apply_sequence_parallel(model, plan, mesh, self.counts)
        self.remove = self._parallel.remove

    def options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the transformer options for a call."""
        model_options = {"transformer_options": dict(options)}
        self._parallel.install(model_options, kernel("TORCH"))
        return model_options["transformer_options"]
