"""Gathered weights that stay on real GPUs between forwards: results, gathers, and memory that others need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
from gpu_cases import GPUS, LONG, WAYS, latent, on_workers
from kept_gathering_cases import kept_on_gpus
from kept_graph_cases import phases
from kept_service import KeptService
from other_service import free_workers, gathers, kept, memory, served_by
from shared_gpu_cases import held, wide_wan
from torch import Tensor

from raylight.cluster import active_session
from raylight.dev.local_ranks import run_ranks, values
from raylight.driver import short_of_memory
from raylight.host.recipe import OFFLOADED, SHARDED
from raylight.parallel.graphs import OFF, ON

# One rank gathers nothing but what is in system memory.
GATHERED = (SHARDED, OFFLOADED) if GPUS > 1 else (OFFLOADED,)


@pytest.fixture(autouse=True)
def no_failure_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_of_memory, "_short", set())


@pytest.fixture(scope="module", autouse=True)
def workers_that_count() -> Iterator[None]:
    with served_by("kept_service:open_service"):
        yield


@pytest.mark.parametrize("world", sorted({1, GPUS}))
def test_without_ray(world: int) -> None:
    for found in values(run_ranks(world, kept_on_gpus, device_type="cuda")):
        assert all(all(case) for case in found)


@pytest.mark.parametrize("stays_here", [False, True])
@pytest.mark.parametrize("sharding", GATHERED)
def test_later_runs_gather_less(sharding: str, stays_here: bool, path: Path, expected: Tensor, compare) -> None:
    model, counts = on_workers(path, sharding), []
    free_workers()
    for turn in range(4):
        before = gathers()
        compare(latent(model, stays_here), expected, f"run {turn}")
        counts.append(gathers() - before)
    assert kept() > 0
    assert counts[1] < counts[0], counts
    assert counts[2:] == [0, 0], counts


@pytest.mark.parametrize("sharding", GATHERED)
def test_loras_and_larger_sizes(sharding: str, path: Path, lora: Path, stock, expected: Tensor, compare) -> None:
    long = latent(stock, shape=LONG)
    patched = comfy.sd.load_lora_for_models(stock, None, comfy.utils.load_torch_file(str(lora)), 0.8, 0)[0]
    with_lora = latent(patched)
    plain, changed = on_workers(path, sharding), on_workers(path, sharding, (lora, 0.8))
    for turn in ("first", "second"):
        compare(latent(plain), expected, f"{turn}, plain")
        compare(latent(changed), with_lora, f"{turn}, with a LoRA")
        compare(latent(plain, shape=LONG), long, f"{turn}, large")
        compare(latent(plain, shape=LONG), long, f"{turn}, large again")
    assert kept() > 0


@pytest.mark.parametrize("sharding", GATHERED)
def test_goes_to_who_needs_memory(sharding: str, folder: Path, path: Path, expected: Tensor, compare) -> None:
    wide = wide_wan(folder)
    wanted = latent(comfy.sd.load_diffusion_model(str(wide)))
    comfy.model_management.unload_all_models()
    model = on_workers(wide, sharding)
    for turn in range(3):
        compare(latent(model), wanted, f"run {turn}")
    full, nbytes = held(), kept()
    assert nbytes > 0
    # ComfyUI needs memory on its GPU: what is gathered goes, on all ranks, and the shards stay.
    device = comfy.model_management.get_torch_device()
    comfy.model_management.free_memory(0, device)  # workers give what they do not use
    free = comfy.model_management.get_free_memory(device)
    comfy.model_management.free_memory(free + nbytes // 2, device)
    assert kept() == 0
    assert held() == full
    compare(latent(model), wanted, "after ComfyUI had memory")
    assert kept() == nbytes
    # So it is beside a second model, of which weights stay gathered too.
    other = on_workers(path, sharding)
    for turn in range(3):
        compare(latent(other), expected, f"the other, run {turn}")
        compare(latent(model), wanted, f"beside the other, run {turn}")
    assert kept() > nbytes


@pytest.mark.parametrize(("world", "offload"), sorted({(1, True), (GPUS, True), (GPUS, GPUS == 1)}))
def test_graphs_as_kept_units_come_change_and_go(world: int, offload: bool) -> None:
    for rank, (units, found) in enumerate(values(run_ranks(world, phases, offload, "cuda", device_type="cuda"))):
        captures = rank < world - 1 or world == 1
        assert all(phase.equal for phase in found.values()), found
        assert found["captured"].gathers == 0
        assert [phase.kept for phase in found.values()] == [*[units] * 5, 0, units]
        replays = [phase.replays for phase in found.values()]
        assert replays == ([0, 2, 2, 2, 2, 0, 2] if captures else [0] * 7), found


@pytest.mark.parametrize("stays_here", [False, True])
@pytest.mark.parametrize("sharding", GATHERED)
def test_stay_gathered_beside_graphs(
    sharding: str, stays_here: bool, path: Path, lora: Path, stock: Any, expected: Tensor, compare
) -> None:
    patched = comfy.sd.load_lora_for_models(stock, None, comfy.utils.load_torch_file(str(lora)), 0.8, 0)[0]
    with_lora, long = latent(patched), latent(stock, shape=LONG)
    eager, graphed = on_workers(path, sharding, graphs=OFF), on_workers(path, sharding, graphs=ON)
    changed = on_workers(path, sharding, (lora, 0.8), graphs=ON)
    for turn in ("first", "second"):
        compare(latent(eager, stays_here), expected, f"{turn}, without graphs")
        compare(latent(graphed, stays_here), expected, f"{turn}, with graphs")
        compare(latent(changed, stays_here), with_lora, f"{turn}, with a LoRA")
        compare(latent(graphed, stays_here, shape=LONG), long, f"{turn}, large")
        compare(latent(graphed, stays_here, shape=LONG), long, f"{turn}, large again")
    before = gathers()
    compare(latent(graphed, stays_here, shape=LONG), long, "nothing is gathered")
    assert gathers() == before
    assert kept() > 0 and all(rank.graph_bytes > 0 for rank in memory())


@pytest.mark.parametrize("sharding", WAYS)
def test_a_run_is_repeated_without_what_made_it_faster(
    sharding: str, path: Path, expected: Tensor, compare, caplog: pytest.LogCaptureFixture
) -> None:
    model = on_workers(path, sharding)
    for turn in range(3):
        compare(latent(model), expected, f"run {turn}")
    assert kept() + sum(rank.graph_bytes for rank in memory()) > 0
    active_session.running().run_all(KeptService.run_out, 0)
    compare(latent(model), expected, "the run that is repeated")
    assert caplog.text.count("do it again without these") == 1
    assert kept() + sum(rank.graph_bytes for rank in memory()) == 0
    compare(latent(model), expected, "the run after it")
