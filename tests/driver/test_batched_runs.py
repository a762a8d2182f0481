"""Several runs in one request, on groups of workers, against ComfyUI doing them one by one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from dropin_cases import SETUPS, equal_lengths, prompt, sample

from raylight.cluster import active_session
from raylight.cluster.config import SessionConfig
from raylight.driver import api, batched_runs
from raylight.driver.batched_runs import join_batch, run_batched
from raylight.driver.pending_run import PendingRun
from raylight.host.jobs import RunResult, random_state
from raylight.host.pickling import NotSerializableError
from raylight.host.recipe import REPLICATED, SHARDED, ModelRecipe, RayModel, WorkerConfig
from raylight.parallel.mesh import MeshShape

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes")

TOLERANCE = 1e-4
SEEDS = (3, 7, 11)


def dropin(path: Path, mesh: MeshShape, sharding: str) -> ModelPatcher:
    return api.load(
        RayModel(
            WorkerConfig(SessionConfig(mesh, "cpu"), "TORCH_FLASH"), ModelRecipe.of(str(path), "default", sharding)
        )
    )


class CountedNoise(Noise_RandomNoise):
    """Counts how often a node asks for it."""

    asked = 0

    def generate_noise(self, input_latent: dict[str, Any]) -> torch.Tensor:
        CountedNoise.asked += 1
        return super().generate_noise(input_latent)


def runs(model: ModelPatcher, samplers: tuple[str, ...], masked: bool = False) -> list[Any]:
    """Runs that differ in noise, prompt and its length, and in steps."""
    mask = {"noise_mask": torch.ones(1, 1, 12, 10).tril()} if masked else {}
    return [
        partial(
            api.ksampler,
            noise=CountedNoise(seed),
            ray_actors=model,
            latent_image={"samples": torch.zeros(1, 16, 12, 10), **mask},
            positive=prompt(seed, 10 + seed),
            negative=prompt(2, 17),
            add_noise="enable",
            steps=2 + place,
            cfg=2.0,
            sampler_name=samplers[place],
            scheduler="simple",
            start_at_step=0,
            end_at_step=10000,
            return_with_leftover_noise="disable",
        )
        for place, seed in enumerate(SEEDS)
    ]


@pytest.mark.parametrize(
    ("mesh", "sharding"),
    [
        (MeshShape(ulysses=2), REPLICATED),
        (MeshShape(batch=2), REPLICATED),
        (MeshShape(batch=2), SHARDED),
        pytest.param(MeshShape(batch=3), SHARDED, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_equals_comfyui_one_by_one(
    mesh: MeshShape, sharding: str, path: Path, stock: ModelPatcher, caplog: pytest.LogCaptureFixture
) -> None:
    samplers = ("euler", "heun", "dpmpp_2m_sde")
    expected = [run()["samples"] for run in runs(stock, samplers, masked=True)]
    CountedNoise.asked = 0
    with caplog.at_level(logging.INFO, "raylight"):
        actual = [latent["samples"] for latent in run_batched(runs(dropin(path, mesh, sharding), samplers, True))]
    assert "the workers do 3 runs at once" in caplog.text
    assert CountedNoise.asked == 3, "the code around a sampling runs once"
    for one, other in zip(actual, expected, strict=True):
        assert ((one - other).abs().max() / other.std()).item() <= TOLERANCE
    assert (expected[0] - expected[1]).std() > 0.1


@pytest.mark.slow
def test_fewer_runs_than_groups_and_runs_that_stay_here(path: Path, stock: ModelPatcher) -> None:
    model = dropin(path, MeshShape(batch=3), SHARDED)
    for count, stays_here in ((2, False), (1, False), (2, True)):
        actual = run_batched(
            [partial(sample, SETUPS["plain"](model), seed=seed, stays_here=stays_here) for seed in SEEDS[:count]]
        )
        for seed, (one, _) in zip(SEEDS, actual, strict=False):
            other, _ = sample(SETUPS["plain"](stock), seed=seed)
            assert ((one - other).abs().max() / other.std()).item() <= TOLERANCE


CPU = torch.device("cpu")
PLACE: ContextVar[str] = ContextVar("PLACE", default="")


def pending(session: str = "session", model: str = "model") -> PendingRun:
    return PendingRun(
        session, SimpleNamespace(model=model, random=random_state(CPU)), None, False, lambda: pytest.fail("repeated")
    )


def sampling(log: list[str], name: str, **job: str) -> Callable[[], tuple[Any, ...]]:
    """A node that draws, samples and draws again; it logs how often each half runs."""

    def run() -> tuple[Any, ...]:
        log.append(f"{name} begins")
        before = torch.rand(1).item()
        one = pending(**job)
        result = join_batch(one)
        log.append(f"{name} ends")
        samples = "done here" if result is None else one.conclude(result)
        return samples, before, torch.rand(1).item(), torch.is_inference_mode_enabled(), PLACE.get()

    return run


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many runs each request has. The workers' result of a run is its place; they draw 10 numbers for it."""
    found: list[int] = []

    def complete(all_pending: list[PendingRun]) -> list[RunResult]:
        found.append(len(all_pending))
        results = []
        for place, one in enumerate(all_pending):
            generator = torch.Generator()
            generator.set_state(one.job.random.cpu)
            torch.rand(10, generator=generator)
            results.append(RunResult(place, SimpleNamespace(cpu=generator.get_state(), cuda=None), None))
        return results

    monkeypatch.setattr(batched_runs, "complete", complete)
    return found


def alive() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if isinstance(thread, batched_runs._RunThread)]


def test_each_run_is_called_once_and_keeps_its_state(requests: list[int]) -> None:
    log: list[str] = []
    PLACE.set("a node")
    torch.manual_seed(1)
    results = run_batched([sampling(log, "a"), sampling(log, "b"), lambda: log.append("c")])
    assert requests == [2] and results[2] is None
    assert log == ["a begins", "b begins", "c", "a ends", "b ends"]
    torch.manual_seed(1)
    for place, (samples, before, after, inference, node) in enumerate(results[:2]):
        assert (samples, inference, node) == (place, True, "a node")
        assert before == torch.rand(1).item()
        state = torch.get_rng_state()
        torch.rand(10)
        assert after == torch.rand(1).item(), "as after its own sampling"
        torch.set_rng_state(state)
    assert torch.is_inference_mode_enabled() and not alive()


def test_runs_of_other_models_or_sessions_go_on_by_themselves(requests: list[int]) -> None:
    for other in ({"model": "other"}, {"session": "other"}):
        results = run_batched([sampling([], "a"), sampling([], "b", **other)])
        assert [samples for samples, *_ in results] == ["done here"] * 2
    assert requests == [] and not alive()


def test_runs_that_workers_cannot_unpack_go_on_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    def complete(_: Any) -> Any:
        raise NotSerializableError("no such class")

    monkeypatch.setattr(batched_runs, "complete", complete)
    torch.manual_seed(1)
    results = run_batched([sampling([], "a"), sampling([], "b")])
    torch.manual_seed(1)
    first, second, third = (torch.rand(1).item() for _ in range(3))
    assert results[0][:3] == ("done here", first, second) and results[1][:3] == ("done here", second, third)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("fails", ["before", "in", "after"])
def test_an_error_ends_all_runs(
    fails: str, kind: type[BaseException], requests: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    def fail(*_: Any) -> Any:
        raise kind("no such thing")

    def failing() -> Any:
        if fails == "before":
            fail()
        join_batch(pending())
        return fail()

    def cleaning_up() -> Any:
        try:
            return sampling(log, "c")()
        finally:
            log.append("c is unwound")

    if fails == "in":
        monkeypatch.setattr(batched_runs, "complete", fail)
    with pytest.raises(kind, match="no such thing"):
        run_batched([cleaning_up, failing] if fails == "before" else [sampling(log, "a"), failing, cleaning_up])
    assert not alive()
    assert log[-1] == "c is unwound" and "c ends" not in log
    assert ("a ends" in log) == (fails == "after")


def test_a_second_sampling_of_a_run_is_done_by_itself(requests: list[int]) -> None:
    def twice() -> list[Any]:
        return [join_batch(pending()) is None, join_batch(pending()) is None]

    assert run_batched([twice, twice]) == [[False, True]] * 2
    assert join_batch(pending()) is None, "outside of a batch"


@pytest.mark.parametrize("steps", [(40, 2), (40, 40)])
@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
def test_a_cancel_ends_the_runs_of_all_groups(
    sharding: str, steps: tuple[int, int], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dropin(path, MeshShape(batch=2), sharding)
    each = [partial(sample, equal_lengths(model), seed=seed, steps=count) for seed, count in enumerate(steps)]
    short = [partial(sample, equal_lengths(model), seed=seed, steps=1) for seed in range(2)]
    run_batched(short)
    before = active_session.running()
    report = PendingRun.report

    def report_and_cancel(self: PendingRun, step: Any) -> None:
        report(self, step)
        if step.step == 4:
            comfy.model_management.interrupt_current_processing()

    with monkeypatch.context() as patch:
        patch.setattr(PendingRun, "report", report_and_cancel)
        try:
            with pytest.raises(comfy.model_management.InterruptProcessingException):
                run_batched(each)
        finally:
            comfy.model_management.interrupt_current_processing(False)
    assert len(run_batched(short)) == 2
    assert active_session.running() is before
