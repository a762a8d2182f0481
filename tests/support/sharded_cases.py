"""Families with their weights split over ranks, against the same model whole in the same process."""

from __future__ import annotations

import traceback
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from comfy.cli_args import args

args.cpu = True  # before ComfyUI picks a device

from matrix_cases import copied, split  # noqa: E402

from raylight.host.sharded import METHODS  # noqa: E402
from raylight.parallel.mesh import build_mesh, world_axis  # noqa: E402
from raylight.parallel.shape import MeshShape  # noqa: E402
from raylight.sharding import fsdp  # noqa: E402
from raylight.sharding.units import units  # noqa: E402
from raylight.zoo import families  # noqa: E402
from raylight.zoo.family import Draw  # noqa: E402

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sharded:
    """What one rank measured. `blocks` are the model's; `gathers` the all-gathers of one forward, where only weights
    are gathered."""

    error: float = 1.0
    report: fsdp.ShardReport | None = None
    blocks: int = 0
    gathers: int = 0
    failure: str = ""


def compare_sharded(rank: int, world: int, names: tuple[str, ...], sequence: bool,
                    offload: bool) -> dict[str, Sharded]:
    """The first call of each family; with `sequence` its tokens are split as well."""
    mesh = build_mesh(MeshShape(ulysses=world) if sequence else MeshShape(batch=world), CPU)
    results = {}
    for name in names:
        try:
            with torch.inference_mode():
                results[name] = _compare(name, mesh, sequence, offload)
        except Exception:  # told by the test of this family
            results[name] = Sharded(failure=traceback.format_exc())
    return results


def _compare(name: str, mesh: Any, sequence: bool, offload: bool) -> Sharded:
    family = families()[name]
    model = family.build()
    make = next(iter(family.calls.values()))
    expected = model.apply_model(**make(Draw(3)))
    weights = {key: parameter.detach() for key, parameter in model.diffusion_model.named_parameters()}
    blocks = len(units(model.diffusion_model))
    options = split(model.diffusion_model, mesh).options({}) if sequence else {}
    with torch.inference_mode(False):
        report = fsdp.shard(model.diffusion_model, weights, world_axis(mesh), CPU, offload, METHODS)
    with torch.profiler.profile() if not sequence else nullcontext() as profile:
        actual = model.apply_model(**copied(make(Draw(3))), transformer_options=options)
    counted = profile.key_averages() if profile is not None else ()
    gathers = sum(event.count for event in counted if event.key == "c10d::_allgather_base_")
    error = ((actual - expected).abs().max() / expected.std()).item()
    return Sharded(error, report, blocks, gathers)
