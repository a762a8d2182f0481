"""GGUF files loaded by ranks, replicated and sharded, against ComfyUI with the pack's own loader in one process."""

from __future__ import annotations

import importlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from comfy.cli_args import args

args.cpu = True  # before ComfyUI picks a device

import comfy.sd
from counting import CountingGathers
from gguf_files import PACK
from loaded_cases import CPU, wan_inputs
from loras import KINDS, lora_for
from torch import Tensor

from raylight.host.checkpoint import MappedModel
from raylight.host.gguf import load_gguf, open_pack
from raylight.parallel.mesh import MeshShape, build_mesh, world_axis
from raylight.sharding.gatherer import Gatherer
from raylight.worker import lora
from raylight.worker.patcher import RankPatcher
from raylight.worker.replicated_patcher import build_replicated
from raylight.worker.sharded_patcher import build_sharded

Loras = tuple[tuple[dict[str, Tensor], float], ...]


@dataclass(frozen=True)
class Compared:
    """What one rank measured, in standard deviations of ComfyUI's output: the difference from it without and with two
    LoRAs, their effect, and after other LoRAs, after removal, after leaving the device and after coming to it in two
    parts the difference from weights that never were otherwise. `own` counts the bytes that are this rank's alone, and
    `gathered` those that it has after the gathers of a forward with the LoRAs.
    """

    error: float
    patched: float
    effect: float
    changed: float
    removed: float
    back: float
    in_parts: float
    own: int
    gathered: int


def stock(path: Path) -> Any:
    """ComfyUI's patcher as the pack's loader node makes it."""
    pack = open_pack(PACK)
    tensors, metadata = pack.read(str(path))
    model = comfy.sd.load_diffusion_model_state_dict(tensors, {"custom_operations": pack.operations()}, metadata)
    return importlib.import_module(f"{pack.name}.nodes").GGUFModelPatcher.clone(model)


def two_loras(shapes: dict[str, tuple[int, ...]]) -> Loras:
    return (lora_for(shapes, ["lora"], 1), 0.8), (lora_for(shapes, KINDS, 2), -0.6)


def compare_gguf(rank: int, world: int, path: Path, modes: tuple[str, ...], like: Path) -> dict[str, Compared]:
    """A Wan file in each of the modes, held by `world` ranks, against ComfyUI with the file `like`, which has the same
    weights. It is gone before LoRAs change.
    """
    mesh = world_axis(build_mesh(MeshShape(batch=world), CPU))
    with torch.no_grad():
        expected = _expected(like)
        return {mode: _compare(rank, mesh, path, mode, *expected) for mode in modes}


def _expected(path: Path) -> tuple[Tensor, Tensor, Loras]:
    patcher = stock(path)
    loras = two_loras({name: tuple(one.shape) for name, one in patcher.model.named_parameters()})
    base = patcher.model.apply_model(**wan_inputs())
    for tensors, strength in loras:
        patcher, _ = comfy.sd.load_lora_for_models(patcher, None, dict(tensors), strength, 0)
    patcher.patch_model(CPU)
    return base, patcher.model.apply_model(**wan_inputs()), loras


def _compare(rank: int, mesh: Any, path: Path, mode: str, base: Tensor, expected: Tensor, loras: Loras) -> Compared:
    mine = Path(shutil.copy(path, path.with_suffix(f".{rank}.gguf")))

    def load() -> tuple[MappedModel, RankPatcher, int]:
        mapped = load_gguf(str(mine), PACK)
        if mode == "replicated":
            return mapped, *build_replicated(mapped, CPU)
        patcher, report = build_sharded(mapped, mesh, mode == "offloaded")
        return mapped, patcher, report.bytes

    def result(held: tuple[MappedModel, RankPatcher, int], loras: Loras, in_parts: bool = False) -> Tensor:
        mapped, patcher, _ = held
        patcher = patcher.clone()
        for tensors, strength in loras:
            fitted = lora.fit_lora("lora", tensors, mapped.lora_keys, lora.WeightShapes(mapped.shapes))
            patcher.add_patches(fitted.patches, strength)
        if in_parts:
            patcher.unpatch_model(CPU)
            patcher.load(CPU, lowvram_model_memory=patcher.model_size() // 2)
        patcher.partially_load(CPU, 10**12)
        return patcher.model.apply_model(**wan_inputs())

    untouched = result(load(), ())
    other = ((loras[1][0], 0.3),)
    fresh = result(load(), other)
    held = load()
    mine.unlink()
    counted = CountingGathers()
    with patch.object(Gatherer, "start", counted.around(Gatherer.start)):
        both = result(held, loras)
    changed = result(held, other)
    removed = result(held, ())
    held[1].detach()
    back = result(held, ())
    in_parts = result(held, loras, in_parts=True)
    deviation = base.std()
    return Compared(
        *(
            ((one - other).abs().max() / deviation).item()
            for one, other in (
                (untouched, base),
                (both, expected),
                (expected, base),
                (changed, fresh),
                (removed, untouched),
                (back, untouched),
                (in_parts, both),
            )
        ),
        held[2],
        counted.gathered,
    )
