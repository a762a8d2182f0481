"""Every situation of a family with its plan taken away, against the whole forward in one process."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from comfy.cli_args import args

args.cpu = True  # before ComfyUI picks a device

from raylight.attention.kernels import kernel
from raylight.dev.local_ranks import run_ranks, values
from raylight.dev.zoo import families
from raylight.dev.zoo.family import Draw, Family
from raylight.parallel.mesh import MeshShape, build_mesh, sequence_axis
from raylight.parallel.ring import HybridAttention
from raylight.parallel.sequence_parallel import SequenceGroup
from raylight.worker.drafted_plans import DraftedPlans
from raylight.worker.forward_kinds import copied
from raylight.worker.proving import ROWS
from raylight.worker.unplanned import UnplannedModel

from .logged import logged

CPU = torch.device("cpu")
TOLERANCE = 1e-4
_CALLS = 3  # a first call may fill caches that a model keeps, and is then not proven
SPLIT, BY_ROWS, WHOLE, PATCHED, WRONG = "split", "batch rows", "whole", "patched by nodes", "wrong"


@dataclass(frozen=True)
class DayOne:
    """What one rank measured of one situation: the largest error of all calls, in standard deviations of the whole
    output; the calls of attention that exchanged tokens in the last; and what was logged. `failure` is a traceback.
    """

    error: float
    exchanges: int
    rows: bool = False
    patched: bool = False
    said: tuple[str, ...] = ()
    failure: str = ""


def first_days(rank: int, world: int, names: Sequence[str], shape: MeshShape) -> dict[tuple[str, str], DayOne]:
    """Call every situation of these families until its way is known and once more, each with a model that was never
    seen.
    """
    mesh = build_mesh(shape, CPU)
    results = {}
    for name in names:
        for call in families()[name].calls:
            try:
                with torch.inference_mode():
                    results[name, call] = _first_day(families()[name], call, mesh)
            except Exception:  # reported for this situation
                results[name, call] = DayOne(float("inf"), 0, failure=traceback.format_exc())
    return results


def _first_day(family: Family, call: str, mesh: Any) -> DayOne:
    base = family.build()
    inputs = family.calls[call](Draw(3))
    options = inputs.pop("transformer_options", {})
    expected = base.apply_model(**copied(inputs), transformer_options=dict(options))
    strategy = _Counting(HybridAttention(mesh.get_group("ulysses"), mesh.get_group("ring")))
    error = 0.0
    with tempfile.TemporaryDirectory() as folder, logged() as said:
        model = UnplannedModel(base.diffusion_model, DraftedPlans(base, Path(folder, "plans.json")), mesh, CPU)
        model.finalize_hooks()
        model_options = {"transformer_options": dict(options)}
        model.install(model_options, kernel("TORCH"), ("TORCH",), False)
        model.use(SequenceGroup.of(sequence_axis(mesh).get_group(), strategy))
        for _ in range(_CALLS):
            is_known = options or model.ways
            strategy.calls = 0
            actual = base.apply_model(**copied(inputs), **model_options)
            error = max(error, ((actual - expected).abs().max() / expected.std()).item())
            if is_known:
                break
        rows = ROWS in model.ways
        model.remove()
    return DayOne(error, strategy.calls, rows, bool(options), tuple(said))


class _Counting:
    """A strategy that counts its calls."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.calls = inner, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self._inner(*args)


def measure(names: Sequence[str], world: int, timeout_s: float = 1500) -> dict[tuple[str, str], list[DayOne]]:
    """Return what each of `world` Ulysses ranks measured, by family and situation."""
    ranks = values(run_ranks(world, first_days, tuple(names), MeshShape(ulysses=world), timeout_s=timeout_s))
    return {key: [rank[key] for rank in ranks] for key in ranks[0]}


def outcomes(measured: Mapping[tuple[str, str], Sequence[DayOne]]) -> dict[tuple[str, str], str]:
    """Return how each situation was computed after its first forward, WRONG if an output was not right."""
    return {key: _outcome(ranks) for key, ranks in measured.items()}


def _outcome(ranks: Sequence[DayOne]) -> str:
    if any(rank.failure or not rank.error <= TOLERANCE for rank in ranks):
        return WRONG
    if all(rank.exchanges for rank in ranks):
        return SPLIT
    return BY_ROWS if ranks[0].rows else PATCHED if ranks[0].patched else WHOLE
