"""The drop-in MODEL in ComfyUI's own nodes, against a MODEL of ComfyUI's loader: same inputs, float32, on the CPU."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path

import comfy.sd
import latent_preview
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras import nodes_context_windows, nodes_custom_sampler
from dropin_cases import EVEN, MORE_SETUPS, SAMPLERS, SETUPS, SHAPE, STAYING, STEPS, OnlyHere, equal_lengths, sample
from loras import lora_for

from raylight.cluster.config import SessionConfig
from raylight.dev.demo.prompts import random_prompt
from raylight.dev.demo.tiny import write_checkpoint
from raylight.driver import api, model_forward
from raylight.host.recipe import REPLICATED, SHARDED, ModelRecipe, RayModel, WorkerConfig
from raylight.parallel.mesh import MeshShape

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes")

TOLERANCE = 1e-4
WORKERS = WorkerConfig(SessionConfig(MeshShape(ulysses=2), "cpu"), "TORCH_FLASH")


@pytest.fixture(scope="module")
def dropin(path: Path) -> ModelPatcher:
    return api.load(RayModel(WORKERS, ModelRecipe.of(str(path), "default")))


SMOKE = [("euler", "plain"), ("euler_ancestral", "skipped_layers")]
# Each set-up with one sampler and each sampler with one set-up, as neither looks into the other.
QUICK = [*itertools.product(SAMPLERS[:1], SETUPS | MORE_SETUPS), *itertools.product(SAMPLERS[1:], ["skipped_layers"])]
# But for a mask and new noise in each step, and for a sampler that asks for the schedule that a set-up has shifted.
SLOW = [
    *itertools.product(["euler_ancestral"], [name for name in SETUPS if name != "skipped_layers"]),
    ("dpmpp_2m_sde", "basic_shifted"),
]


@pytest.mark.parametrize(
    ("sampler", "set_up"),
    [
        pytest.param(
            *run, marks=[*([pytest.mark.smoke] if run in SMOKE else []), *([pytest.mark.slow] if run in SLOW else [])]
        )
        for run in [*QUICK, *SLOW]
    ],
)
def test_equals_comfyui(
    sampler: str, set_up: str, stock: ModelPatcher, dropin: ModelPatcher, caplog: pytest.LogCaptureFixture
) -> None:
    make = (SETUPS | MORE_SETUPS)[set_up]
    masked = sampler in ("heun", "euler_ancestral")
    expected, shown = sample(make(stock), sampler, masked)
    assert expected.std() > 0.1
    for stays_here in (False, True):
        caplog.clear()
        with caplog.at_level(logging.INFO, "raylight"):
            actual, seen = sample(make(dropin), sampler, masked, stays_here)
        assert ("the sampling loop stays in ComfyUI" in caplog.text) == stays_here
        assert _error(actual, expected) <= TOLERANCE
        assert len(seen) == len(shown)
        assert max(_error(*pair) for pair in zip(seen, shown, strict=True)) <= TOLERANCE


def test_comfyui_is_asked_for_memory_in_each_run(dropin: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    ask_with_room, ask = model_forward.ask_with_room, model_forward.ask
    monkeypatch.setattr(model_forward, "ask_with_room", lambda *all_: asked.append(True) or ask_with_room(*all_))
    monkeypatch.setattr(model_forward, "ask", lambda *all_, **named: asked.append(False) or ask(*all_, **named))
    for _ in range(2):
        asked.clear()
        sample(equal_lengths(dropin), stays_here=True, steps=2)
        assert asked == [True, False]


def test_a_previewer_of_a_pack_sees_all_images(
    stock: ModelPatcher, dropin: ModelPatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those that show a video as such, and whose function takes the place of ComfyUI's."""
    seen: list[torch.Tensor] = []

    class Previewer(latent_preview.LatentPreviewer):
        def decode_latent_to_preview_image(self, preview_format: str, x0: torch.Tensor) -> None:
            seen.append(x0.clone())

    monkeypatch.setattr(latent_preview, "get_previewer", lambda *_: Previewer())
    shown = []
    for model in (stock, dropin):
        seen = []
        sample(SETUPS["plain"](model), shape=(2, *SHAPE[1:]), callback=latent_preview.prepare_callback(model, STEPS))
        shown.append(seen)
    assert len(shown[0]) == len(shown[1]) == STEPS and len(shown[0][0]) > 1
    assert max(_error(*pair) for pair in zip(*reversed(shown), strict=True)) <= TOLERANCE


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.std()).item()


def test_what_workers_cannot_deserialize_stays_here(
    stock: ModelPatcher, dropin: ModelPatcher, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = sample(SETUPS["plain"](stock))
    with caplog.at_level(logging.INFO, "raylight"):
        actual, _ = sample(SETUPS["plain"](dropin), held=OnlyHere())
    assert "stays in ComfyUI, and each forward goes to the workers: it could not be unpacked" in caplog.text
    assert "ending the workers" not in caplog.text
    assert _error(actual, expected) <= TOLERANCE


@pytest.mark.parametrize("set_up", STAYING)
def test_networks_of_other_nodes_take_part(set_up: str, stock: ModelPatcher, dropin: ModelPatcher) -> None:
    expected, _ = sample(STAYING[set_up](stock), shape=EVEN)
    assert (expected - sample(SETUPS["plain"](stock), shape=EVEN)[0]).std() > 1e-2, "it changes nothing"
    actual, _ = sample(STAYING[set_up](dropin), shape=EVEN)
    assert _error(actual, expected) <= TOLERANCE


@pytest.mark.parametrize("stays_here", [False, True])
def test_a_model_of_comfyui_is_taken_over_with_what_is_on_it(
    stays_here: bool, stock: ModelPatcher, tmp_path: Path
) -> None:
    shapes = {name: tuple(weight.shape) for name, weight in stock.model.named_parameters()}
    lora = lora_for(shapes, ["lora", "loha", "lokr"], 1)
    dressed, _ = comfy.sd.load_lora_for_models(stock, None, lora, 0.7, 0)
    guider = SETUPS["skipped_layers"](dressed)
    expected, _ = sample(guider)
    plain, _ = sample(SETUPS["skipped_layers"](stock))
    assert (expected - plain).std() > 1e-2 * plain.std(), "the LoRA changes nothing"
    before = api.parallelize(dressed, WORKERS)
    actual, _ = sample(SETUPS["skipped_layers"](before), stays_here=stays_here)
    assert _error(actual, expected) <= TOLERANCE
    after = api.parallelize(guider.model_patcher, WORKERS)
    guider.model_patcher, guider.model_options = after, after.model_options
    actual, _ = sample(guider, stays_here=stays_here)
    assert _error(actual, expected) <= TOLERANCE


def _windows(model: ModelPatcher, _: dict[str, torch.Tensor]) -> ModelPatcher:
    """Windows of 3 of the latent's 7 frames, with noise that is shuffled from window to window."""
    execute = nodes_context_windows.WanContextWindowsManualNode.execute
    return execute(model, 9, 4, "standard_static", 1, False, "pyramid", True).result[0]


def _bypass(model: ModelPatcher, lora: dict[str, torch.Tensor]) -> ModelPatcher:
    """A LoRA that is computed beside the weights."""
    return comfy.sd.load_bypass_lora_for_models(model, None, lora, 1.0, 0)[0]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "wan.safetensors"
    write_checkpoint(path, "wan-t2v", heads=3)
    return path


@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
@pytest.mark.parametrize("change", [_windows, _bypass])
def test_a_video_model_with(change: Callable[..., ModelPatcher], sharding: str, video: Path) -> None:
    stock = comfy.sd.load_diffusion_model(str(video))
    lora = lora_for({name: tuple(weight.shape) for name, weight in stock.model.named_parameters()}, ["lora"], 1)
    width = stock.model.diffusion_model.text_embedding[0].weight.shape[1]
    dropin = api.load(RayModel(WORKERS, ModelRecipe.of(str(video), "default", sharding)))
    prompts = [random_prompt(12, width, seed) for seed in (1, 2)]

    def video_of(model: ModelPatcher) -> torch.Tensor:
        guider = nodes_custom_sampler.CFGGuider.execute(model, *prompts, 3.0).result[0]
        return sample(guider, shape=(1, 16, 7, 8, 8), looks=False)[0]

    expected = video_of(change(stock, lora))
    assert _error(video_of(stock), expected) > 100 * TOLERANCE
    assert _error(video_of(change(dropin, lora)), expected) <= TOLERANCE


@pytest.mark.parametrize("sharding", [REPLICATED, pytest.param(SHARDED, marks=pytest.mark.smoke)])
def test_a_lora_by_comfyuis_loader_reaches_the_workers(sharding: str, stock: ModelPatcher, path: Path) -> None:
    dropin = api.load(RayModel(WORKERS, ModelRecipe.of(str(path), "default", sharding)))
    shapes = {name: tuple(weight.shape) for name, weight in stock.model.named_parameters()}
    lora = lora_for(shapes, ["lora", "dora"], 2)
    for strength in (0.7, -0.4, 0.0):
        expected, actual = (
            sample(
                SETUPS["plain"](comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0] if strength else model)
            )[0]
            for model in (stock, dropin)
        )
        assert _error(actual, expected) <= TOLERANCE


@pytest.mark.parametrize("sharding", [REPLICATED, pytest.param(SHARDED, marks=pytest.mark.slow)])
def test_compiled_for_prompts_of_any_length(
    sharding: str, stock: ModelPatcher, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After the second length, torch.compile takes lengths for unknown numbers."""
    compiled = api.load(RayModel(WORKERS, ModelRecipe.of(str(path), "default", sharding))).clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    for set_up in (SETUPS["plain"], equal_lengths):
        expected, actual = (sample(set_up(model))[0] for model in (stock, compiled))
        assert _error(actual, expected) <= TOLERANCE
    assert "lru_cache" not in caplog.text


def test_rejects_merging_and_saving_what_is_not_here(dropin: ModelPatcher) -> None:
    for use in (lambda: dropin.get_key_patches("diffusion_model."), lambda: dropin.state_dict_for_saving()):
        with pytest.raises(ValueError, match="are on Raylight's workers and not in ComfyUI"):
            use()
