"""Parallelize after loaders that name no file, and after nodes that change weights, against ComfyUI itself."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_cases import CASES, ParityCase, checkpoint, sample
from comfy_extras import nodes_model_merging
from gguf_cases import stock as stock_gguf
from gguf_files import write_gguf
from loras import KINDS, lora_for
from quantised import quantise

from raylight.cluster import active_session
from raylight.cluster.config import SessionConfig
from raylight.driver import api, model_import
from raylight.host.recipe import OFFLOADED, REPLICATED, SHARDED, WorkerConfig
from raylight.host.worker_service import WorkerService
from raylight.parallel.mesh import MeshShape

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("as_comfyui_runs_nodes")]
TOLERANCE = 1e-4
WORKERS = WorkerConfig(SessionConfig(MeshShape(ulysses=2), "cpu"), "TORCH_FLASH")
WAN, FLUX = CASES["Wan T2V"], CASES["Flux"]
EXPORTED = "from ComfyUI's memory"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallelized")


def of_a_pack(model: ModelPatcher) -> ModelPatcher:
    """As loaders of packs return it, which do not name the file that they read."""
    model.cached_patcher_init = None
    return model


def with_lora(model: ModelPatcher, kinds: Any = ("lora",)) -> ModelPatcher:
    shapes = {name: tuple(weight.shape) for name, weight in model.model.named_parameters()}
    return comfy.sd.load_lora_for_models(model, None, lora_for(shapes, list(kinds), 1), 0.7, 0)[0]


def parallel(model: ModelPatcher, sharding: str = REPLICATED) -> ModelPatcher:
    return api.parallelize(model, replace(WORKERS, sharding=sharding))


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.std()).item()


def wan(folder: Path) -> ModelPatcher:
    return of_a_pack(comfy.sd.load_diffusion_model(str(checkpoint(folder, WAN))))


def flux(folder: Path) -> ModelPatcher:
    return of_a_pack(comfy.sd.load_diffusion_model(str(checkpoint(folder, FLUX))))


def scaled_fp8(folder: Path) -> ModelPatcher:
    path = folder / "fp8.safetensors"
    quantise(checkpoint(folder, WAN), path, "float8_e4m3fn")
    return of_a_pack(comfy.sd.load_diffusion_model(str(path)))


def in_bf16(folder: Path) -> ModelPatcher:
    return of_a_pack(comfy.sd.load_diffusion_model(str(checkpoint(folder, WAN)), {"dtype": torch.bfloat16}))


def gguf(folder: Path) -> ModelPatcher:
    path = folder / "flux.gguf"
    write_gguf(checkpoint(folder, FLUX), path, "Q8_0", "flux")
    model = stock_gguf(path)
    path.unlink()  # so that it has to come from memory
    return model


@pytest.mark.parametrize(
    ("load", "case", "shardings"),
    [
        (wan, WAN, (REPLICATED, SHARDED)),
        (flux, FLUX, (OFFLOADED,)),
        (scaled_fp8, WAN, (REPLICATED, SHARDED)),
        (in_bf16, WAN, (SHARDED,)),
        (gguf, FLUX, (REPLICATED, SHARDED)),
    ],
)
def test_after_a_loader_that_names_no_file(
    load: Callable[[Path], ModelPatcher],
    case: ParityCase,
    shardings: tuple[str, ...],
    folder: Path,
    report_parity,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = load(folder)
    plain, patched = sample(model, case), sample(with_lora(model), case)
    assert error(patched, plain) > 1e-2, "the LoRA changes nothing"
    with caplog.at_level(logging.INFO, "raylight"):
        for sharding in shardings:
            worst = max(
                error(sample(parallel(with_lora(model), sharding), case), patched),
                error(sample(parallel(model, sharding), case), plain),
                error(sample(with_lora(parallel(model, sharding)), case), patched),
            )
            report_parity(
                f"Parallelize after a loader that names no file, {load.__name__:<10} {sharding:<9} max "
                f"error {worst:.1e} of the standard deviation"
            )
            assert worst <= TOLERANCE
    assert caplog.text.count(EXPORTED) == 1
    assert "the sampling loop stays in ComfyUI" not in caplog.text


def test_a_pack_of_which_the_file_is_mapped_needs_no_memory(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_gguf(checkpoint(folder, FLUX), folder / "mapped.gguf", "Q4_0", "flux")
    model = stock_gguf(folder / "mapped.gguf")
    expected = sample(with_lora(model, KINDS), FLUX)
    with caplog.at_level(logging.INFO, "raylight"):
        actual = sample(parallel(with_lora(stock_gguf(folder / "mapped.gguf"), KINDS)), FLUX)
    assert EXPORTED not in caplog.text
    assert error(actual, expected) <= TOLERANCE


def test_merged_models(folder: Path) -> None:
    one = flux(folder)
    other = of_a_pack(comfy.sd.load_diffusion_model(str(checkpoint(folder, FLUX, seed=1))))
    (merged,) = nodes_model_merging.ModelMergeSimple().merge(one, other, 0.4)
    expected = sample(merged, FLUX)
    assert error(sample(one, FLUX), expected) > 1e-2
    assert error(sample(parallel(merged), FLUX), expected) <= TOLERANCE


def test_weights_that_were_changed_in_place(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = comfy.sd.load_diffusion_model(str(checkpoint(folder, WAN)))
    plain = sample(model, WAN)
    assert error(sample(parallel(model), WAN), plain) <= TOLERANCE
    with caplog.at_level(logging.INFO, "raylight"):
        for _ in range(2):
            model.model.diffusion_model.head.head.weight.mul_(1.5)
            expected = sample(model, WAN)
            assert error(expected, plain) > 1e-2
            assert error(sample(parallel(model), WAN), expected) <= TOLERANCE
            assert error(sample(parallel(model), WAN), expected) <= TOLERANCE
        assert caplog.text.count(EXPORTED) == 2
    assert (
        "weights of the WAN21 model are no longer those of wan-t2v-3-0.safetensors, or it has others: "
        "head.head.weight" in caplog.text
    )


def test_what_an_earlier_node_gave_goes_on(folder: Path) -> None:
    """A graph may run a model before and after a node that changes it."""
    model = wan(folder)
    plain = sample(model, WAN)
    before = parallel(model)
    recipe = model_import.recipe_of(model, WORKERS)
    model.model.diffusion_model.head.head.weight.mul_(1.5)
    after = parallel(model)
    assert error(sample(after, WAN), sample(model, WAN)) <= TOLERANCE
    assert error(sample(parallel(before, SHARDED), WAN), plain) <= TOLERANCE
    del before
    gc.collect()
    assert not recipe.is_there
    assert model_import.recipe_of(model, WORKERS).is_there


def test_workers_release_models_that_no_longer_exist(folder: Path) -> None:
    model = wan(folder)
    sample(parallel(model), WAN)
    recipe = model_import.recipe_of(model, WORKERS)
    session = active_session.running()
    before = [model.name for model in session.run(WorkerService.memory).models]
    del model
    gc.collect()
    assert not recipe.is_there
    sample(parallel(flux(folder)), FLUX)
    assert active_session.running() is session
    held = [model.name for model in session.run(WorkerService.memory).models]
    assert held[-1] == "Flux (from memory)"
    assert held.count("WAN21 (from memory)") < before.count("WAN21 (from memory)")
