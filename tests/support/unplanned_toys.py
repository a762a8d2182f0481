"""Models that no plan is for, and whose split goes wrong in ways that the proof has to find."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from comfy.cli_args import args

args.cpu = not torch.cuda.is_available()  # before ComfyUI picks a device

from comfy.ldm.modules.attention import optimized_attention
from comfy_cases import CASES, sample, sample_stock
from counting import CountingStrategy
from fake_graphs import CPU, FakeBackend, cpu_as_device
from torch import Tensor, nn

from raylight.attention.kernels import kernel
from raylight.dev.zoo.day_one.logged import logged
from raylight.host.jobs import ModelJob
from raylight.host.recipe import ModelRecipe
from raylight.parallel.degrees import Arrangement, DegreesByRun
from raylight.parallel.external_strategies import OURS
from raylight.parallel.graph_pool import GraphPool
from raylight.parallel.graphs import ON
from raylight.parallel.mesh import Meshes, MeshShape, build_mesh, sequence_axis, world_axis
from raylight.parallel.ring import HybridAttention
from raylight.parallel.sequence_parallel import SequenceGroup
from raylight.sharding.fsdp import announce_to, reset, shard
from raylight.worker import parallel_model
from raylight.worker.cuda_graphs import GraphedForward
from raylight.worker.drafted_plans import DraftedPlans
from raylight.worker.parallelize import load_parallel
from raylight.worker.patcher import mode_of
from raylight.worker.unplanned import UnplannedModel

WIDTH, HEADS = 16, 4


class Block(nn.Module):
    """A block of one stream, whose `flaw` is what happens to its tokens besides attention."""

    def __init__(self, flaw: str) -> None:
        super().__init__()
        self.flaw, self.heads = flaw, 2 if flaw == "few heads" else HEADS
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.neighbours = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.kept = torch.zeros(1)

    def forward(self, x: Tensor, timesteps: Tensor | None, transformer_options: Any = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + optimized_attention(q, k, v, self.heads, transformer_options=transformer_options)
        if self.flaw == "odd" and x.shape[1] % 2:
            raise ValueError("an odd number of tokens")
        if self.flaw == "convolution":
            x = x + nn.functional.conv1d(
                x.movedim(1, 2), self.neighbours.weight, self.neighbours.bias, padding=1
            ).movedim(2, 1)
        if self.flaw == "mean" or (self.flaw == "late" and timesteps is not None and timesteps < 0.5):
            x = x - x.mean(1, keepdim=True)
        if self.flaw == "keeps":
            x, self.kept = x + self.kept, x.mean(1, keepdim=True)
        return x


class Toy(nn.Module):
    """Blocks of one stream."""

    forwards = 0  # of all, as a number of its own would be something that it keeps

    def __init__(self, flaw: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(flaw) for _ in range(2))

    def forward(self, x: Tensor, timesteps: Tensor | None = None, transformer_options: Any = None) -> Tensor:
        Toy.forwards += 1
        for block in self.blocks:
            x = block(x, timesteps, transformer_options=transformer_options)
        return x


@dataclass(frozen=True)
class Day:
    """What one rank measured: the largest error of all outputs in standard deviations, exchanges and forwards of each
    call, the number of plans that were found, what was logged, and what was logged of batch rows.
    """

    error: float
    exchanges: tuple[int, ...]
    forwards: tuple[int, ...]
    plans: int
    said: tuple[str, ...]
    of_rows: tuple[str, ...]


class Split:
    """A toy taken over by `model`, with the `options` for its calls. `strategy` counts its exchanges."""

    def __init__(self, toy: Toy, mesh: Any, file: Path, device: torch.device = CPU, graphs: Any = None) -> None:
        """Keep plans in `file`. `graphs` of the toy are paused where a forward is not proven."""
        base: Any = SimpleNamespace(diffusion_model=toy, model_config=SimpleNamespace(unet_config={}))
        pause = nullcontext if graphs is None else graphs.paused
        self.strategy = CountingStrategy(HybridAttention(mesh.get_group("ulysses"), mesh.get_group("ring")))
        self.options: dict[str, Any] = {}
        self.model = UnplannedModel(toy, DraftedPlans(base, file), mesh, device, pause)
        self.model.finalize_hooks()
        self.model.install(self.options, kernel("TORCH"), ("TORCH",), False)
        self.model.use(SequenceGroup.of(sequence_axis(mesh).get_group(), self.strategy))


Case = tuple[str, tuple[int, ...], torch.dtype, Path]  # flaw, lengths of the sequences, their dtype, file of plans


def toy_days(rank: int, world: int, cases: Sequence[Case]) -> list[Day]:
    """Call a new toy for each of these cases."""
    return [toy_day(rank, world, *case) for case in cases]


def toy_day(
    rank: int, world: int, flaw: str, lengths: tuple[int, ...], dtype: torch.dtype, file: Path, on: str = "cpu"
) -> Day:
    """Call a toy with sequences of these lengths."""
    torch.manual_seed(0)
    device = torch.device(on, rank if on == "cuda" else 0)
    mesh = build_mesh(MeshShape(ulysses=world), device)
    model = Toy(flaw).requires_grad_(False).to(device, dtype)
    sequences = [torch.randn(1, length, WIDTH).to(device, dtype) for length in lengths]
    time = torch.ones(1, device=device)
    stock = copy.deepcopy(model)
    expected = [stock(x, time) for x in sequences]
    exchanges, forwards, error = [], [], 0.0
    with logged() as said, logged("raylight.worker.layouts") as of_rows:
        split = Split(model, mesh, file, device)
        for x, whole in zip(sequences, expected, strict=True):
            split.strategy.calls = Toy.forwards = 0
            result = model(x, time, **split.options)  # by position, as ComfyUI passes both
            exchanges.append(split.strategy.calls)
            forwards.append(Toy.forwards)
            error = max(error, ((result - whole).abs().max() / whole.std()).item())
        found = sum(way.plan is not None for way in split.model.ways)
        split.model.remove()
    assert model._compiled_call_impl is None
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    return Day(error, tuple(exchanges), tuple(forwards), found, tuple(said), tuple(of_rows))


def graphed_days(
    rank: int, world: int, lengths: tuple[int, ...], cases: Sequence[tuple[str, bool, Path]]
) -> list[list[tuple[float, int, int, int]]]:
    """Return the result of `graphed_day` for each of these flaws, kinds of weights and files."""
    return [graphed_day(rank, world, flaw, lengths, file, shards) for flaw, shards, file in cases]


def graphed_day(
    rank: int, world: int, flaw: str, lengths: tuple[int, ...], file: Path, shards: bool
) -> list[tuple[float, int, int, int]]:
    """Call a toy with sequences of these lengths, as graphs without a GPU where it is proven. Return for each call its
    error in standard deviations, the captures and the replays so far, and its exchanges.
    """
    torch.manual_seed(0)
    mesh = build_mesh(MeshShape(ulysses=world), CPU)
    model = Toy(flaw).requires_grad_(False)
    sequences = [torch.randn(1, length, WIDTH) for length in lengths]
    expected = [model(x) for x in sequences]
    if shards:
        weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        shard(model, weights, world_axis(mesh), CPU)
    backend = FakeBackend()
    graphs = GraphedForward(model, GraphPool(backend), lambda: None, lambda: reset(model), lambda: split.model.way)
    split = Split(model, mesh, file, graphs=graphs)
    graphs.use(ON, "test", "", announce_to(model))
    found = []
    with torch.no_grad(), cpu_as_device():
        for x, whole in zip(sequences, expected, strict=True):
            split.strategy.calls = 0
            result = model(x, torch.zeros(1), **split.options)  # by position, as ComfyUI passes both
            error = ((result - whole).abs().max() / whole.std()).item()
            found.append((error, backend.captures, backend.replays, split.strategy.calls))
    split.model.remove()
    graphs.remove()
    assert model._compiled_call_impl is None and "forward" not in vars(model)
    return found


def compiled_calls(rank: int, world: int, file: Path) -> list[tuple[float, int]]:
    """Call a toy compiled, as it is twice, and compiled again; return the errors, and the exchanges of each call."""
    torch.manual_seed(0)
    mesh = build_mesh(MeshShape(ulysses=world), CPU)
    model = Toy("").requires_grad_(False)
    x, time = torch.randn(1, 10, WIDTH), torch.ones(1)
    whole = model(x, time)
    split = Split(model, mesh, file)
    compiled, found = torch.compile(model, backend="eager"), []
    with torch.inference_mode():
        for forward in (compiled, model, model, compiled):
            split.strategy.calls = 0
            error = (forward(x, time, **split.options) - whole).abs().max() / whole.std()
            found.append((error.item(), split.strategy.calls))
    return found


def sampled_each(
    rank: int, world: int, path: Path, cases: Sequence[tuple[Any, ...]]
) -> list[tuple[float, list[str], list[str]]]:
    """Return the result of `sampled` for the other arguments of each case."""
    return [sampled(rank, world, path, *case) for case in cases]


def sampled(
    rank: int,
    world: int,
    path: Path,
    sharding: str,
    shape: MeshShape,
    user: Path,
    on: str = "cpu",
    degrees_by_run: bool = False,
    known_rows: bool = False,
    strategy: str = OURS,
) -> tuple[float, list[str], list[str]]:
    """Sample a Wan checkpoint without its plan; return the error in standard deviations, what was logged, and what was
    told of degrees by the run. With `known_rows` its rows are known to be independent, as those of a U-Net.
    """
    import folder_paths

    folder_paths.set_user_directory(str(user))
    case, device = CASES["Wan T2V"], torch.device(on, rank if on == "cuda" else 0)
    expected = sample_stock(path, case)
    before = parallel_model.plan_for, parallel_model.has_known_rows

    def no_plan(*_: Any) -> Any:
        raise ValueError("no plan")

    parallel_model.plan_for, parallel_model.has_known_rows = no_plan, lambda _: known_rows
    recipe = ModelRecipe.of(str(path), "default", sharding)
    try:
        with mode_of(sharding), logged("raylight.worker" if known_rows else "raylight.worker.unplanned") as said:
            meshes, told = Meshes(device), []
            by_run = DegreesByRun(Arrangement(shape, by_run=True), meshes) if degrees_by_run else None
            model = load_parallel(recipe, meshes.of(shape, keep=True), device, by_run)
            patcher = model.patched((), None).clone()
            model.parallel.install(patcher.model_options, ModelJob(recipe, "TORCH", strategy), told.append)
            actual = sample.__wrapped__(patcher, case)
    finally:
        parallel_model.plan_for, parallel_model.has_known_rows = before
    return ((actual - expected).abs().max() / expected.std()).item(), said, told
