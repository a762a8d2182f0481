"""A rank that gives back GPU memory: how much, of which model, and that the model is right after.

The CPU by its number is used as a GPU, and what PyTorch would have reserved there is counted from where weights are.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import comfy.model_management
import pytest
import torch
from comfy.model_management import current_loaded_models, load_models_gpu
from comfy_cases import CASES, checkpoint
from giving_back_cases import (
    WITHOUT_GRAPHS,
    agreed_after_loads,
    bytes_after_a_cancel,
    gone_with_what_was_sent,
    sizes_after_each,
)
from mode_cases import patches_for

from raylight.dev.local_ranks import run_ranks, values
from raylight.host.checkpoint import load_mapped
from raylight.host.recipe import OFFLOADED, REPLICATED, FileStamp, ModelRecipe
from raylight.worker.model_cache import CachedModel, ModelCache
from raylight.worker.patcher import RankPatcher, mode_of
from raylight.worker.replicated_patcher import build_replicated

CPU, GPU = torch.device("cpu"), torch.device("cpu", 0)
FREE = 1 << 40


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models"), CASES["Flux"])


def free_memory(_: object, torch_free_too: bool = False) -> object:
    return (FREE, 0) if torch_free_too else FREE


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelCache]:
    models = ModelCache(torch.device("cuda"), world_size=1)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", free_memory)
    monkeypatch.setattr(comfy.model_management, "reset_cast_buffers", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: sum(one.patcher.loaded_size() for one in models.all()))
    with mode_of(REPLICATED):
        yield models
    current_loaded_models.clear()
    gc.collect()


def held(models: ModelCache, path: Path, name: str) -> CachedModel:
    """A model on the GPU, without the parts of a worker that memory does not concern."""
    mapped = load_mapped(str(path), {})
    patcher, own_bytes = build_replicated(mapped, CPU, in_file=True)
    patcher.load_device = GPU
    model = CachedModel(
        ModelRecipe(name, "default", FileStamp(1)), patcher, WITHOUT_GRAPHS, mapped.lora_keys, mapped.shapes, own_bytes
    )
    models.add(model)
    use(patcher)
    return model


def use(patcher: RankPatcher) -> None:
    """Bring a model to the GPU as a run does, with a patcher that ends with it."""
    load_models_gpu([patcher.clone()])


def result(model: CachedModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    latent, context = torch.randn(1, 16, 8, 6, generator=generator), torch.randn(1, 5, 160, generator=generator)
    pooled = torch.randn(1, 96, generator=generator)
    return model.patcher.model.apply_model(latent, torch.tensor([0.7]), c_crossattn=context, y=pooled)


def test_what_is_asked_for_and_no_more_least_recently_used_first(models: ModelCache, path: Path) -> None:
    first, second = held(models, path, "first"), held(models, path, "second")
    size = first.patcher.model_size()
    before = result(first)
    assert models.give_back(0) == 0 and models.give_back(None) == 0
    part = size // 4
    assert part <= models.give_back(part) < size // 2
    assert 0 < first.patcher.loaded_size() < size and second.patcher.loaded_size() == size
    assert torch.allclose(result(first), before, atol=1e-5)  # of weights that are cast when they are used
    left = first.patcher.loaded_size()
    assert models.give_back(left + part) >= left + part
    assert first.patcher.loaded_size() == 0 and 0 < second.patcher.loaded_size() < size
    assert models.give_back(10 * size) > 0
    assert second.patcher.loaded_size() == 0
    use(first.patcher)
    assert first.patcher.loaded_size() == size and second.patcher.loaded_size() == 0
    assert torch.equal(result(first), before)


def test_only_what_left_comes_back_and_goes_back_to_the_file(models: ModelCache, path: Path) -> None:
    model = held(models, path, "model")
    stayed = {name: weight.data_ptr() for name, weight in model.patcher.model.named_parameters()}
    for _ in range(2):  # the second time, weights have been to the GPU that had left it before
        models.give_back(model.patcher.model_size() // 3)
        in_file = {weight.data_ptr() for weight in model.patcher.weights.tensors.values()}
        now = dict(model.patcher.model.named_parameters())
        moved = [name for name, weight in now.items() if weight.data_ptr() != stayed[name]]
        assert 0 < len(moved) < len(now)
        assert all(now[name].data_ptr() in in_file for name in moved)
        use(model.patcher)
        stayed = {name: weight.data_ptr() for name, weight in model.patcher.model.named_parameters()}
        assert not in_file & set(stayed.values())


def test_with_a_lora(models: ModelCache, path: Path) -> None:
    model = held(models, path, "model")
    plain = result(model)
    with_lora = model.patcher.clone()
    with_lora.add_patches(patches_for(model), 0.8)
    use(with_lora)
    before = result(model)
    assert not torch.allclose(before, plain, atol=1e-3)
    models.give_back(model.patcher.model_size() // 3)
    assert torch.allclose(result(model), before, atol=1e-5)
    use(with_lora)
    assert torch.equal(result(model), before)
    models.give_back(model.patcher.model_size() // 3)
    use(model.patcher)
    assert torch.equal(result(model), plain)


def test_as_a_whole_after_a_cancelled_load(models: ModelCache, path: Path) -> None:
    model = held(models, path, "model")
    with_lora = model.patcher.clone()
    with_lora.add_patches(patches_for(model), 0.8)
    use(with_lora)
    before = result(model)
    current_loaded_models.clear()  # where ComfyUI puts a model when it is loaded
    models.give_back(model.patcher.model_size() // 3)
    assert model.patcher.loaded_size() == 0
    use(with_lora)
    assert torch.equal(result(model), before)


def test_a_rank_gives_back_whole_weights_alone_and_shards_with_the_others(path: Path) -> None:
    wanted = [{0: 0.0}, {0: 0.3}, {0: 0.0, 1: 0.0}, {1: 2.0}]
    first, second = values(run_ranks(2, sizes_after_each, path, wanted, timeout_s=200))
    assert first[0] == second[0] == second[1] == second[2] == (1.0, 1.0)
    assert 0.5 < first[1][0] <= 0.7 and first[1] == first[2] and first[1][1] == 1.0
    assert first[3] == (first[1][0], 0.0) and second[3] == (0.0, 0.0)


def test_groups_with_runs_of_their_own_load_a_split_model_as_often_as_each_needs(path: Path) -> None:
    assert values(run_ranks(2, agreed_after_loads, path, timeout_s=200)) == [0, 0]


def test_shards_that_a_cancel_leaves_in_part_are_given_back(path: Path) -> None:
    for before, away, cancelled, back in values(run_ranks(2, bytes_after_a_cancel, path, timeout_s=200)):
        assert before == back > 0
        assert away == cancelled == 0


@pytest.mark.parametrize("sharding", [REPLICATED, OFFLOADED])
def test_a_model_that_is_dropped_leaves_memory_at_once(sharding: str, path: Path) -> None:
    # What single calls have left of it, and on it, goes too; and after "Unload Models" what was sent to them.
    assert values(run_ranks(1, gone_with_what_was_sent, path, sharding, timeout_s=60)) == [([False, True], 0)]
