"""Runs of the product with forwards as graphs, on workers without a GPU: against ComfyUI in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from dropin_cases import MORE_SETUPS, SETUPS, equal_lengths, sample
from graph_service import GraphService
from loras import lora_for
from other_service import free_workers, kept, memory, served_by
from safetensors.torch import load_file

from raylight.cluster import active_session
from raylight.cluster.config import SessionConfig
from raylight.driver import api
from raylight.host.recipe import OFFLOADED, REPLICATED, SHARDED, ModelRecipe, RayModel, WorkerConfig
from raylight.parallel.external_strategies import OURS, OURS_INT8
from raylight.parallel.graph_pool import LARGEST_NUMBER
from raylight.parallel.graphs import OFF, ON
from raylight.parallel.mesh import MeshShape

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes")

TOLERANCE = 1e-4
STEPS = 5

both_depths = pytest.mark.parametrize("depth", [False, True], ids=["whole run", "loop in ComfyUI"])


@pytest.fixture(scope="module", autouse=True)
def workers_with_graphs() -> Iterator[None]:
    with served_by("graph_service:open_service"):
        yield


def dropin(
    path: Path, mesh: MeshShape, sharding: str = REPLICATED, strategy: str = OURS, graphs: str = ON
) -> ModelPatcher:
    config = WorkerConfig(SessionConfig(mesh, "cpu"), "TORCH_FLASH", strategy=strategy, graphs=graphs)
    return api.load(RayModel(config, ModelRecipe.of(str(path), "default", sharding)))


def replays() -> int:
    counts = {rank.graph_bytes for rank in memory()}
    assert len(counts) == 1, "ranks do not replay alike"
    return counts.pop()


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return ((actual - expected).abs().max() / expected.std()).item() <= TOLERANCE


def copied_conds() -> int:
    """How much conditioning each rank has copied to stay."""
    session = active_session.running()
    assert session is not None
    (count,) = set(session.run_all(GraphService.copied_conds).values())
    return count


SETS: dict[str, tuple[Callable, int]] = {
    # Forwards of a run that are replays: both prompts have a kind of their own, of which two run as they are.
    "plain": (SETUPS["plain"], 2 * (STEPS - 2)),
    "same length": (equal_lengths, STEPS - 2),
    "basic_shifted": (SETUPS["basic_shifted"], STEPS - 2),
    "skipped_layers": (SETUPS["skipped_layers"], 2 * (STEPS - 2)),  # and the forwards without layers as they are
    "dual_cfg": (MORE_SETUPS["dual_cfg"], 0),
    "lazy_cache": (MORE_SETUPS["lazy_cache"], 0),
    "easy_cache": (MORE_SETUPS["easy_cache"], 0),
}


@pytest.mark.parametrize(
    ("mesh", "depth"),
    [(MeshShape(ulysses=2), False), (MeshShape(batch=2), True)],
    ids=["Ulysses 2, whole run", "CFG 2, loop in ComfyUI"],
)
@pytest.mark.parametrize("name", SETS)
def test_equals_comfyui(name: str, mesh: MeshShape, depth: bool, path: Path, stock: ModelPatcher) -> None:
    set_up, least = SETS[name]
    expected = sample(set_up(stock), steps=STEPS)[0]
    model = dropin(path, mesh)
    comfy.model_management.unload_all_models()
    before = replays()
    for _ in range(2):
        assert same(sample(set_up(model), stays_here=depth, steps=STEPS)[0], expected)
    assert replays() - before >= least
    assert all(rank.graphs <= LARGEST_NUMBER for rank in memory())


@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
@pytest.mark.parametrize("name", [*SETUPS, *MORE_SETUPS])
def test_conditioning_is_copied_once_in_a_run(name: str, sharding: str, path: Path, stock: ModelPatcher) -> None:
    set_up = (SETUPS | MORE_SETUPS)[name]
    expected = sample(set_up(stock), steps=2)[0]
    model = dropin(path, MeshShape(ulysses=2), sharding)
    sample(set_up(model), steps=2)
    counts = [copied_conds()]
    for steps in (2, 3):
        result = sample(set_up(model), steps=steps)[0]
        assert steps != 2 or same(result, expected)
        counts.append(copied_conds())
    assert counts[2] - counts[1] == counts[1] - counts[0] > 0


@both_depths
@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
def test_loras_in_turns(sharding: str, depth: bool, path: Path, stock: ModelPatcher) -> None:
    shapes = {f"diffusion_model.{key}": tuple(tensor.shape) for key, tensor in load_file(path).items()}
    tensors = lora_for(shapes, ["lora"], 1, size=0.06)

    def with_lora(model: ModelPatcher, strength: float) -> ModelPatcher:
        return comfy.sd.load_lora_for_models(model, None, dict(tensors), strength, 0)[0]

    model = dropin(path, MeshShape(ulysses=2), sharding)
    before = replays()
    for strength in (0.8, 0.0, 0.4, 0.8):
        expected = sample(SETUPS["plain"](with_lora(stock, strength) if strength else stock), steps=STEPS)[0]
        one = with_lora(model, strength) if strength else model
        assert same(sample(SETUPS["plain"](one), stays_here=depth, steps=STEPS)[0], expected), strength
    assert replays() - before >= 4


@both_depths
@pytest.mark.parametrize(("sharding", "mesh"), [(SHARDED, MeshShape(ulysses=2)), (OFFLOADED, MeshShape(batch=2))])
def test_gathered_weights(sharding: str, mesh: MeshShape, depth: bool, path: Path, stock: ModelPatcher) -> None:
    expected = sample(equal_lengths(stock), steps=STEPS)[0]
    model = dropin(path, mesh, sharding)
    free_workers()
    counts = [replays()]
    for _ in range(3):
        assert same(sample(equal_lengths(model), stays_here=depth, steps=STEPS)[0], expected)
        counts.append(replays())
    # Two forwards are measured before weights stay gathered, the next two run as they are, and the rest are replays.
    assert [after - before for before, after in pairwise(counts)] == [STEPS - 4, STEPS, STEPS]
    assert kept() > 0
    without = dropin(path, mesh, sharding, graphs=OFF)
    assert same(sample(equal_lengths(without), stays_here=depth, steps=STEPS)[0], expected)
    assert replays() == counts[-1]
    free_workers()
    assert kept() == 0 and [rank.graphs for rank in memory()] == [0, 0]


@both_depths
def test_exchanges_in_8_bits(depth: bool, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Which are measured in the first forward of each run, and then no rank replays: another may not be able to."""

    def made(graphs: str, steps: int = STEPS) -> torch.Tensor:
        model = dropin(path, MeshShape(ulysses=2), strategy=OURS_INT8, graphs=graphs)
        return sample(equal_lengths(model), stays_here=depth, steps=steps)[0]

    expected, counts = made(OFF), [replays()]
    with caplog.at_level("INFO", "raylight"):
        for steps in (STEPS, 1, STEPS):
            actual = made(ON, steps)
            assert steps == 1 or torch.equal(actual, expected)
            counts.append(replays())
    first, second, third = (after - before for before, after in pairwise(counts))
    assert (second, third) == (0, STEPS - 1) and first >= STEPS - 3
    told = [message for message in caplog.messages if message.startswith("exchange: in 8 bits, which changed")]
    assert len(told) == 3


def test_nothing_is_left_of_a_model_that_is_unloaded(path: Path) -> None:
    model = dropin(path, MeshShape(ulysses=2))
    sample(SETUPS["plain"](model), steps=STEPS)
    assert all(rank.graphs > 0 for rank in memory())
    comfy.model_management.unload_all_models()
    free_workers()
    assert [rank.graphs for rank in memory()] == [0, 0]
