"""Families with their weights sharded over ranks, against the same model in one process."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any

import torch
from comfy.cli_args import args

args.cpu = True  # before ComfyUI picks a device

import comfy.lora
import comfy.model_patcher
import comfy.sd
from comfy.model_base import BaseModel
from counting import gathered
from loras import KINDS, lora_for
from matrix_cases import Split
from torch import Tensor

from raylight.dev.zoo import families
from raylight.dev.zoo.family import Draw
from raylight.host.checkpoint import MappedModel
from raylight.parallel import memory_shares
from raylight.parallel.mesh import MeshShape, build_mesh, world_axis
from raylight.sharding import fsdp
from raylight.sharding.fsdp import units
from raylight.worker import lora
from raylight.worker.forward_kinds import copied
from raylight.worker.sharded_patcher import build_sharded

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sharded:
    """What one rank measured. `blocks` are the model's; `gathers` the units that one forward gathers, as listed where
    only weights are split; `effect` how much the LoRAs change the result, as a share of its standard deviation.
    """

    error: float = 1.0
    report: fsdp.ShardReport | None = None
    blocks: int = 0
    gathers: int = 0
    effect: float = 0.0
    failure: str = ""


Case = tuple[str, bool, bool, bool]
"""The family, and whether its tokens are split as well, its weights are offloaded, and it has two LoRAs."""


def compare_sharded(
    rank: int, world: int, cases: tuple[Case, ...], memory: tuple[float, ...] = ()
) -> dict[Case, Sharded]:
    """The first call of each case's family. Ranks have so much `memory`, as parts of the weights."""
    meshes = {
        sequence: build_mesh(MeshShape(ulysses=world) if sequence else MeshShape(batch=world), CPU)
        for sequence in (False, True)
    }
    results = {}
    for case in cases:
        name, sequence, offload, patched = case
        try:
            with torch.no_grad():
                results[case] = _compare(name, meshes[sequence], sequence, offload, patched, memory)
        except Exception:  # reported by the test of this family
            results[case] = Sharded(failure=traceback.format_exc())
    return results


def _compare(name: str, mesh: Any, sequence: bool, offload: bool, patched: bool, memory: tuple[float, ...]) -> Sharded:
    family = families()[name]
    model = family.build()
    make = next(iter(family.calls.values()))
    expected = model.apply_model(**make(Draw(3)))
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    mapped = MappedModel(model, {}, CPU, comfy.lora.model_lora_keys_unet(model, {}), shapes)
    loras = two_loras(shapes) if patched else ()
    unpatched, effect = expected, 0.0
    if patched:
        expected = _patched_by_comfyui(model, loras, make)
        effect = ((expected - unpatched).std() / expected.std()).item()
    nbytes = sum(parameter.nbytes for parameter in model.diffusion_model.parameters())
    memory_shares.use(tuple(int(part * nbytes) for part in memory))
    blocks = len(units(model.diffusion_model))
    options = Split(model.diffusion_model, mesh).options({}) if sequence else {}
    patcher, report = build_sharded(mapped, world_axis(mesh), offload)
    patcher = patcher.clone()
    for index, (tensors, strength) in enumerate(loras):
        fitted = lora.fit_lora(f"LoRA {index}", tensors, mapped.lora_keys, lora.WeightShapes(shapes))
        patcher.add_patches(fitted.patches, strength)
    patcher.load(CPU)
    with gathered() as found:
        actual = model.apply_model(**copied(make(Draw(3))), transformer_options=options)
    error = ((actual - expected).abs().max() / expected.std()).item()
    return Sharded(error, report, blocks, len(found), effect)


def two_loras(shapes: dict[str, tuple[int, ...]]) -> tuple[tuple[dict[str, Tensor], float], ...]:
    """One of the usual kind, and one of every kind, a layer each, with their strengths."""
    return (lora_for(shapes, ["lora"], 1), 0.8), (lora_for(shapes, KINDS, 2), -0.6)


def _patched_by_comfyui(model: BaseModel, loras: Any, make: Any) -> Tensor:
    patcher = comfy.model_patcher.ModelPatcher(model, CPU, CPU)
    for tensors, strength in loras:
        patcher, _ = comfy.sd.load_lora_for_models(patcher, None, dict(tensors), strength, 0)
    patcher.patch_model(CPU)
    expected = model.apply_model(**make(Draw(3)))
    patcher.unpatch_model(CPU)
    return expected
