"""Degrees by the run, in real workers: any batch against ComfyUI in one process, and what is told of the choice."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_cases import CASES, ParityCase, checkpoint, sample_on_workers, sample_stock
from comfy_extras import nodes_nag
from dropin_cases import EVEN, SETUPS, SHAPE, controlled, dual_cfg, easy_cache, equal_lengths, perp_neg, sample
from safetensors.torch import load_file, save_file

from raylight.cluster import active_session
from raylight.cluster.config import SessionConfig
from raylight.driver import api
from raylight.driver.batched_runs import run_batched
from raylight.host.recipe import REPLICATED, SHARDED, ModelRecipe, RayModel, WorkerConfig
from raylight.parallel.mesh import MeshShape

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes")

TOLERANCE = 1e-4
CHOICE = "degrees: "


def compared_prompts(model: ModelPatcher) -> Any:
    """Attention of the positive prompt looks at that of the negative one."""
    return equal_lengths(nodes_nag.NAGuidance.execute(model, 5.0, 0.5, 1.5).result[0])


SETS: dict[str, Callable[[ModelPatcher], Any]] = {
    "two prompts": equal_lengths,
    "two prompts of other lengths": SETUPS["plain"],
    "one prompt": SETUPS["basic_shifted"],
    "three prompts": perp_neg,
    "three more prompts": dual_cfg,
    "replaced blocks": SETUPS["skipped_layers"],
    "cached": easy_cache,
    "controlled": controlled,
    "compared prompts": compared_prompts,
}
ONE, TWO = "ulysses 2 (one row at a time)", "batch 2 (2 rows over 2 groups)"
UNDIVIDED = "ulysses 2 (one undivided batch at a time)"
THREE = "ulysses 2 (3 rows, which 2 workers cannot divide as well as tokens)"
FOUR = "batch 2 (4 rows over 2 groups)"

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def expected(folder: Path) -> Callable[..., torch.Tensor]:
    stock = comfy.sd.load_diffusion_model(str(checkpoint(folder, CASES["Flux with guidance"])))

    @cache
    def of(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return sample(SETS[name](stock), "euler_ancestral", shape=shape, steps=2)[0]

    return of


def workers(count: int, by_run: bool = True, mesh: MeshShape | None = None) -> WorkerConfig:
    return WorkerConfig(SessionConfig(mesh or MeshShape(ulysses=count), "cpu", by_run=by_run), "TORCH_FLASH")


def dropin(folder: Path, count: int, sharding: str = REPLICATED, **options: Any) -> ModelPatcher:
    path = checkpoint(folder, CASES["Flux with guidance"])
    return api.load(RayModel(workers(count, **options), ModelRecipe.of(str(path), "default", sharding)))


def assert_equals(actual: torch.Tensor, other: torch.Tensor) -> None:
    assert actual.shape == other.shape
    assert ((actual - other).abs().max() / other.std()).item() <= TOLERANCE


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the driver's log says of degrees."""
    return [message.removeprefix(CHOICE) for message in caplog.messages if message.startswith(CHOICE)]


CASES_OF_TWO = [
    ("two prompts", 1, False, REPLICATED, [TWO]),
    ("two prompts", 1, True, REPLICATED, [TWO]),
    ("two prompts", 1, False, SHARDED, [TWO]),
    ("two prompts", 2, False, REPLICATED, [FOUR]),
    ("two prompts of other lengths", 1, False, REPLICATED, [ONE]),
    ("two prompts of other lengths", 1, True, SHARDED, [ONE]),
    ("two prompts of other lengths", 2, False, REPLICATED, [TWO]),
    ("one prompt", 1, False, REPLICATED, [ONE]),
    ("one prompt", 2, False, REPLICATED, [TWO]),
    ("one prompt", 3, False, REPLICATED, [THREE]),
    ("three prompts", 1, False, REPLICATED, [THREE]),
    ("three more prompts", 1, False, SHARDED, None),
    ("replaced blocks", 2, False, REPLICATED, None),
    ("compared prompts", 1, False, REPLICATED, [UNDIVIDED]),
    ("compared prompts", 1, True, REPLICATED, [UNDIVIDED]),
    ("cached", 1, False, REPLICATED, [ONE]),
    ("controlled", 1, False, REPLICATED, None),
]


@pytest.mark.parametrize(("name", "batch", "stays_here", "sharding", "words"), CASES_OF_TWO)
def test_two_workers_equal_comfyui(
    name: str,
    batch: int,
    stays_here: bool,
    sharding: str,
    words: list[str] | None,
    folder: Path,
    expected: Callable[..., torch.Tensor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    shape = (batch, *(EVEN if name == "controlled" else SHAPE)[1:])
    model = dropin(folder, 2, sharding)
    with caplog.at_level(logging.INFO, "raylight"):
        actual, _ = sample(SETS[name](model), "euler_ancestral", shape=shape, steps=2, stays_here=stays_here)
    assert_equals(actual, expected(name, shape))
    assert told(caplog)
    assert words is None or told(caplog) == words


def test_one_session_for_all_degrees_and_again_the_same_picture(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def drawn(name: str, **options: Any) -> torch.Tensor:
        return sample(SETS[name](dropin(folder, 2, **options)), "euler_ancestral", steps=2)[0]

    first = drawn("two prompts")
    session = active_session.running()
    places = dict(session.places)
    one_prompt = drawn("one prompt")
    given = drawn("two prompts", by_run=False, mesh=MeshShape(batch=2))
    assert torch.equal(drawn("two prompts"), first) and torch.equal(drawn("one prompt"), one_prompt)
    assert torch.equal(given, first), "the same degrees give the same picture, whoever chose them"
    assert active_session.running() is session and session.places == places


def test_each_run_tells_its_choice(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = dropin(folder, 2)
    with caplog.at_level(logging.INFO, "raylight"):
        for stays_here in (False, False, True, True):
            sample(equal_lengths(model), steps=2, stays_here=stays_here)
    assert told(caplog) == [TWO] * 4


def test_given_degrees_keep_prompts_together_that_are_compared(
    folder: Path, expected: Callable[..., torch.Tensor]
) -> None:
    model = dropin(folder, 2, by_run=False, mesh=MeshShape(batch=2))
    actual, _ = sample(compared_prompts(model), "euler_ancestral", steps=2)
    assert_equals(actual, expected("compared prompts", SHAPE))
    assert (expected("compared prompts", SHAPE) - expected("two prompts", SHAPE)).std() > 0.01


def test_given_degrees_rule(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "raylight"):
        sample(equal_lengths(dropin(folder, 2, by_run=False)), steps=1)
    assert told(caplog) == []


def runs(model: ModelPatcher, count: int) -> list[Any]:
    return [partial(sample, equal_lengths(model), seed=seed, steps=2) for seed in range(count)]


@pytest.mark.parametrize(
    ("count", "workers_", "sharding", "words"),
    [
        (2, 2, REPLICATED, "batch 2 (2 runs over 2 groups)"),
        (2, 2, SHARDED, "batch 2 (2 runs over 2 groups)"),
        (3, 2, REPLICATED, TWO),  # one after another, each with its own choice
        pytest.param(2, 4, SHARDED, "batch 2 x ulysses 2 (2 runs over 2 groups)", marks=slow),
    ],
)
def test_several_runs(
    count: int, workers_: int, sharding: str, words: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stock = comfy.sd.load_diffusion_model(str(checkpoint(folder, CASES["Flux with guidance"])))
    others = [run()[0] for run in runs(stock, count)]
    with caplog.at_level(logging.INFO, "raylight"):
        found = [latent for latent, _ in run_batched(runs(dropin(folder, workers_, sharding), count))]
    for one, other in zip(found, others, strict=True):
        assert_equals(one, other)
    assert words in told(caplog)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "batch", "words"),
    [
        ("two prompts", 1, "batch 2 x ulysses 2 (2 rows over 2 groups)"),
        ("two prompts", 2, "batch 4 (4 rows over 4 groups)"),
        ("three prompts", 1, "ulysses 4 (3 rows, which 4 workers cannot divide as well as tokens)"),
        ("one prompt", 1, "ulysses 4 (one row at a time)"),
    ],
)
@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
def test_four_workers_equal_comfyui(
    sharding: str,
    name: str,
    batch: int,
    words: str,
    folder: Path,
    expected: Callable[..., torch.Tensor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    shape = (batch, *SHAPE[1:])
    with caplog.at_level(logging.INFO, "raylight"):
        actual, _ = sample(SETS[name](dropin(folder, 4, sharding)), "euler_ancestral", shape=shape, steps=2)
    assert_equals(actual, expected(name, shape))
    assert told(caplog) == [words]


@pytest.mark.slow
def test_more_workers_than_heads_take_a_ring(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = CASES["Flux"]  # with three heads
    path = checkpoint(folder, case)
    with caplog.at_level(logging.INFO, "raylight"):
        actual = sample_on_workers(RayModel(workers(4), ModelRecipe.of(str(path), "default")), case)
    assert_equals(actual, sample_stock(path, case))
    assert told(caplog) == ["ring 2 x ulysses 2 (one row at a time, 3 attention heads for 4 workers)"]


def test_a_model_of_one_head(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = ParityCase("wan-t2v", (1, 16, 3, 10, 14), 4096, heads=1)
    path = checkpoint(folder, case)
    with caplog.at_level(logging.INFO, "raylight"):
        actual = sample_on_workers(RayModel(workers(2), ModelRecipe.of(str(path), "default")), case)
    assert_equals(actual, sample_stock(path, case))
    assert told(caplog)[-1].startswith("batch 2 (2 rows over 2 groups)") or "ring 2" in told(caplog)[-1]


def test_every_worker_does_all_of_a_model_without_a_plan_that_keeps_state(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = ParityCase("wan-t2v", (1, 16, 3, 10, 14), 4096, tokens=(11, 11))
    path = folder / "autoregressive.safetensors"
    metadata = {"config": json.dumps({"transformer": {"causal_ar": True}})}
    save_file(load_file(checkpoint(folder, case)), path, metadata=metadata)
    with caplog.at_level(logging.INFO, "raylight"):
        actual = sample_on_workers(RayModel(workers(2), ModelRecipe.of(str(path), "default")), case)
    assert_equals(actual, sample_stock(path, case))
    assert told(caplog) == ["every worker does all (no plan, and none is proven)"]


def test_prompts_of_several_regions(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = CASES["Flux, regional prompts"]
    path = checkpoint(folder, case)
    with caplog.at_level(logging.INFO, "raylight"):
        actual = sample_on_workers(RayModel(workers(2), ModelRecipe.of(str(path), "default")), case)
    assert_equals(actual, sample_stock(path, case))
    assert told(caplog)


def test_another_library_exchanges(folder: Path) -> None:
    case = CASES["Wan T2V by yunchang"]
    path = checkpoint(folder, case)
    config = WorkerConfig(SessionConfig(MeshShape(ulysses=2), "cpu", by_run=True), "TORCH", strategy=case.strategy)
    actual = sample_on_workers(RayModel(config, ModelRecipe.of(str(path), "default")), case)
    assert_equals(actual, sample_stock(path, case))
