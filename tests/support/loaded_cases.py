"""Model files loaded by ranks, with sharded weights, against ComfyUI's own loader in the same process."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from comfy.cli_args import args

args.cpu = True  # before ComfyUI picks a device

import comfy.lora
import comfy.sd
from comfy.weight_adapter import LoKrAdapter, LoRAAdapter
from counting import CountingGathers
from loras import lora_for
from safetensors.torch import load_file
from torch import Tensor, nn

from raylight.host.checkpoint import MappedModel, load_mapped
from raylight.parallel import memory_shares
from raylight.parallel.mesh import MeshShape, build_mesh, world_axis
from raylight.sharding.fsdp import shard
from raylight.sharding.rows import RowSplit
from raylight.worker import lora
from raylight.worker.sharded_patcher import ShardedPatcher, build_sharded
from raylight.worker.sharded_patches import Patch, ShardPatches

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Loaded:
    """What one rank measured: the largest difference from ComfyUI in standard deviations of its output, and bytes.
    `gathered_bytes` are those that it has after the gathers of one forward, and `sent_bytes` its own of them.
    """

    error: float
    sharded_bytes: int
    replicated_bytes: int
    model_bytes: int
    gathered_bytes: int
    sent_bytes: int


def wan_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "x": torch.randn(1, 16, 2, 10, 14, generator=generator),
        "t": torch.tensor([0.7]),
        "c_crossattn": torch.randn(1, 11, 4096, generator=generator),
    }


def compare_loaded(
    rank: int, world: int, paths: tuple[Path, ...], offload: bool, dtype: torch.dtype | None = None
) -> list[Loaded]:
    """A Wan checkpoint per path, its weights split over `world` ranks, in its own dtypes or in this one."""
    mesh = build_mesh(MeshShape(batch=world), CPU)
    return [_compare(str(path), mesh, offload, {} if dtype is None else {"dtype": dtype}) for path in paths]


@dataclass(frozen=True)
class Patched:
    """What one rank measured of LoRAs on split weights, in standard deviations of ComfyUI's output: the difference from
    ComfyUI with two LoRAs, their effect, and after other strengths, after removal and after shards have left their
    device the difference from weights that never were otherwise.
    """

    error: float
    effect: float
    changed: float
    removed: float
    back: float


PatchedCase = tuple[Path, str, tuple[str, ...]]  # a Wan checkpoint, a dtype or "default", kinds of LoRAs


def compare_patched(
    rank: int, world: int, cases: tuple[PatchedCase, ...], memory: tuple[int, ...] = ()
) -> list[Patched]:
    """Checkpoints split over `world` ranks, with LoRAs; the file is gone before these change. Ranks have so many bytes
    of `memory`, or all the same.
    """
    mesh = world_axis(build_mesh(MeshShape(batch=world), CPU))
    memory_shares.use(memory)
    with torch.no_grad():
        return [_compare_patched(rank, mesh, *case) for case in cases]


def _compare_patched(rank: int, mesh, path: Path, dtype: str, kinds: tuple[str, ...]) -> Patched:
    options = {} if dtype == "default" else {"dtype": getattr(torch, dtype)}
    mine = path.with_suffix(f".{rank}.safetensors")
    shutil.copy(path, mine)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    stock = comfy.sd.load_diffusion_model_state_dict(tensors, model_options=options)
    shapes = {name: tuple(parameter.shape) for name, parameter in stock.model.named_parameters()}
    first, second = lora_for(shapes, kinds, 1), lora_for(shapes, kinds[::-1], 2)
    base = stock.model.apply_model(**wan_inputs())
    for tensors, strength in ((first, 0.8), (second, -0.6)):
        stock, _ = comfy.sd.load_lora_for_models(stock, None, dict(tensors), strength, 0)
    stock.patch_model(CPU)
    expected = stock.model.apply_model(**wan_inputs())

    def load() -> tuple[MappedModel, ShardedPatcher]:
        mapped = load_mapped(str(mine), options)
        return mapped, build_sharded(mapped, mesh, False)[0]

    def result(mapped: MappedModel, patcher: ShardedPatcher, *loras: tuple[dict[str, Tensor], float]) -> Tensor:
        patcher = patcher.clone()
        for tensors, strength in loras:
            fitted = lora.fit_lora("lora", tensors, mapped.lora_keys, lora.WeightShapes(mapped.shapes))
            patcher.add_patches(fitted.patches, strength)
        patcher.read_released()
        patcher.load(CPU)
        return patcher.model.apply_model(**wan_inputs())

    untouched = result(*load())
    fresh = result(*load(), (second, 0.3))
    held = load()
    mine.unlink()
    both = result(*held, (first, 0.8), (second, -0.6))
    changed = result(*held, (second, 0.3))
    removed = result(*held)
    result(*held, (first, 0.8))
    if rank == 0:  # each rank makes room as it needs it
        held[1].unpatch_model(torch.device("cpu", 0))  # as a device where they are not loaded
        assert held[1].weights.shards.released
    back = result(*held, (first, 0.8), (second, -0.6))
    assert not held[1].weights.shards.released
    deviation = expected.std()
    return Patched(
        *(
            ((one - other).abs().max() / deviation).item()
            for one, other in ((both, expected), (expected, base), (changed, fresh), (removed, untouched), (back, both))
        )
    )


REGIONS = (("lokr",), ("dora",), ("lora", "dora"), ("lora", "", "lora"))
"""What patches each third of a weight's rows, as files do that have query, key and value apart."""


def compare_regions(rank: int, world: int) -> list[float]:
    """The largest difference of this rank's rows from ComfyUI's, for each of `REGIONS`."""
    mesh = world_axis(build_mesh(MeshShape(batch=world), CPU))
    return [_compare_regions(mesh, kinds) for kinds in REGIONS]


def _compare_regions(mesh, kinds: tuple[str, ...]) -> float:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    size, weight = 12, draw(36, 12)
    made = {
        "lokr": lambda: LoKrAdapter(set(), (draw(4, 4), draw(3, 3), None, None, None, None, None, None, None)),
        "lora": lambda: LoRAAdapter(set(), (draw(size, 2), draw(2, size), None, None, None, None)),
        "dora": lambda: LoRAAdapter(set(), (draw(size, 2), draw(2, size), None, None, 1 + draw(size, 1), None)),
    }
    patches: list[Patch] = [
        (0.7, made[kind](), 1.0, (0, size * part, size), None) for part, kind in enumerate(kinds) if kind
    ]
    expected = comfy.lora.calculate_weight(patches, weight.clone(), "")
    model = nn.Sequential(nn.Linear(size, 3 * size, bias=False, device="meta"))
    shard(model, {"0.weight": weight}, mesh, CPU)
    split = RowSplit.over(mesh)
    ShardPatches(model, mesh, split, CPU, torch.float32).apply({"diffusion_model.0.weight": patches}, "")
    return (model[0].weight.to_local() - expected[split.own(3 * size)]).abs().max().item()


def _compare(path: str, mesh, offload: bool, options: dict[str, torch.dtype]) -> Loaded:
    # ComfyUI runs in inference mode, where some biases are added in another order; split weights are not run in it.
    with torch.no_grad():
        # Tensors of its own: products with one row are summed in another order where a weight lies at an odd address.
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        stock = comfy.sd.load_diffusion_model_state_dict(tensors, model_options=options)
        expected = stock.model.apply_model(**wan_inputs())
        patcher, report = build_sharded(load_mapped(path, options), world_axis(mesh), offload)
        for _ in range(2):
            with CountingGathers() as counted:
                actual = patcher.model.apply_model(**wan_inputs())
    error = ((actual - expected).abs().max() / expected.std()).item()
    of_rank = report.sharded_bytes, report.replicated_bytes, report.model_bytes
    return Loaded(error, *of_rank, counted.gathered, counted.sent)
