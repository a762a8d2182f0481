"""Runs on real GPUs over NCCL, at both depths and with weights kept in each way, against ComfyUI on one of them."""

from __future__ import annotations

import logging
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_advanced import ModelComputeDtype
from gpu_cases import DEPTHS, HALF, SINGLE, WAYS, error, latent, little_room, on_workers, wan
from torch import Tensor

from raylight.driver import api
from raylight.host.recipe import REPLICATED, SHARDED

both_depths = pytest.mark.parametrize("depth", DEPTHS)
every_way = pytest.mark.parametrize("sharding", WAYS)


@every_way
@both_depths
def test_the_first_run_after_a_load(
    depth: str, sharding: str, path: Path, expected: Tensor, compare, caplog: pytest.LogCaptureFixture
) -> None:
    if DEPTHS[depth] or sharding == REPLICATED:  # of fresh workers: each start takes its time
        api.end_workers(with_ray=False)
    model = on_workers(path, sharding)
    with caplog.at_level(logging.INFO, "raylight"):
        compare(latent(model, DEPTHS[depth]), expected, "first run")
    assert ("the sampling loop stays in ComfyUI" in caplog.text) == DEPTHS[depth]
    compare(latent(model, DEPTHS[depth]), expected, "second run")


@every_way
@both_depths
def test_a_lora_on_and_off_and_on(
    depth: str, sharding: str, path: Path, lora: Path, stock: ModelPatcher, expected: Tensor, compare
) -> None:
    tensors = comfy.utils.load_torch_file(str(lora))

    def with_lora(model: ModelPatcher) -> ModelPatcher:
        return comfy.sd.load_lora_for_models(model, None, tensors, 0.8, 0)[0]

    wanted = latent(with_lora(stock))
    assert error(wanted, expected) > 5 * HALF, "the LoRA changes nothing"
    model = on_workers(path, sharding)
    on = with_lora(model)
    for what, one, right in (
        ("on", on, wanted),
        ("off", model, expected),
        ("on again", on, wanted),
        ("of its own", on_workers(path, sharding, (lora, 0.8)), wanted),
        ("off again", on_workers(path, sharding), expected),
    ):
        compare(latent(one, DEPTHS[depth]), right, what)


@both_depths
def test_a_compute_dtype_after_a_plain_run(
    depth: str, path: Path, stock: ModelPatcher, expected: Tensor, compare
) -> None:
    node = ModelComputeDtype()
    wanted = latent(node.patch(stock, "fp32")[0])
    assert error(wanted, expected) > 2 * SINGLE, "the dtype changes nothing"
    model = on_workers(path, REPLICATED)
    in_float32 = node.patch(model, "fp32")[0]
    for what, one, right, largest in (
        ("plain", model, expected, HALF),
        ("float32", in_float32, wanted, SINGLE),
        ("plain again", model, expected, HALF),
        ("bfloat16", node.patch(model, "bf16")[0], wanted, 5 * HALF),
        ("float32 again", in_float32, wanted, SINGLE),
    ):
        compare(latent(one, DEPTHS[depth]), right, what, largest)


@both_depths
@pytest.mark.parametrize("left_mib", [None, 1000])
def test_two_models_in_turns(
    left_mib: int | None, depth: str, folder: Path, path: Path, expected: Tensor, compare
) -> None:
    """A whole one and a split one, also where each has to go to the CPU for the other."""
    other = wan(folder, seed=1)
    wanted = latent(comfy.sd.load_diffusion_model(str(other)))
    comfy.model_management.unload_all_models()
    first, second = on_workers(path, REPLICATED), on_workers(other, SHARDED)

    def in_turns() -> None:
        for turn in ("first", "second"):
            compare(latent(first, DEPTHS[depth]), expected, f"whole, {turn} turn")
            compare(latent(second, DEPTHS[depth]), wanted, f"split, {turn} turn")

    if left_mib is not None:
        with little_room(left_mib):
            in_turns()
    in_turns()


@every_way
def test_to_the_cpu_and_back(sharding: str, path: Path, expected: Tensor, compare) -> None:
    model = on_workers(path, sharding, free_memory_after=True)
    for depth in (False, True, False):
        compare(latent(model, depth), expected, "after each run")
    comfy.model_management.unload_all_models()
    for depth in (True, False):
        compare(latent(model, depth), expected, "after unloading")
