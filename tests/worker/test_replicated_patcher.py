"""Whole weights that stay in their file until they go to a GPU, in all that ComfyUI does with them.

The CPU by its number is used as a GPU: PyTorch copies what is moved there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_cases import CASES, checkpoint
from diffusers_names import as_diffusers
from mode_cases import patches_for
from quantised import OLD_SCALED_FP8, quantise
from safetensors.torch import load_file, save_file
from torch import Tensor

from raylight.host.checkpoint import MappedModel, load_mapped
from raylight.host.jobs import LoadProgress
from raylight.parallel.heartbeat import cancellation_checked_by
from raylight.sharding.file_weight import FileWeight
from raylight.worker import load_progress
from raylight.worker.patcher import mode_of
from raylight.worker.replicated_patcher import ReplicatedPatcher, build_replicated

CPU, GPU = torch.device("cpu"), torch.device("cpu", 0)
FORMS: dict[str, dict[str, Any]] = {
    "the file's dtype": {},
    "float32 to float16": {"dtype": torch.float16},
    "float32 to fp8": {"dtype": torch.float8_e4m3fn},
    "bfloat16 to float16": {"dtype": torch.float16},
    "diffusers' names": {"dtype": torch.bfloat16},
    "scaled fp8": {},
}


class Held:
    """A model on workers, and the same one of ComfyUI."""

    def __init__(self, form: str, path: Path) -> None:
        self.form, options = form, FORMS[form]
        self.mapped: MappedModel = load_mapped(str(path), dict(options))
        self.patcher: ReplicatedPatcher
        self.patcher, self.own_bytes = build_replicated(self.mapped, CPU, in_file=True)
        self.stock: ModelPatcher = comfy.sd.load_diffusion_model(str(path), model_options=dict(options))
        for one in (self.patcher, self.stock):
            one.load_device = GPU

    @property
    def in_memory(self) -> list[str]:
        """The weights that have memory of this process."""
        found = []
        for name, weight in self.patcher.model.named_parameters():
            parts = self.patcher.weights.stored(weight)
            if isinstance(weight, FileWeight):
                found += [name] if weight._written else []
            elif not {part.data_ptr() for part in parts if part.ndim} <= self._file:
                found.append(name)
        return found

    @property
    def _file(self) -> set[int]:
        weights = self.patcher.weights
        return {part.data_ptr() for weight in weights.tensors.values() for part in weights.stored(weight)}


@pytest.fixture(autouse=True)
def mode() -> Iterator[None]:
    with mode_of("replicated"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(params=FORMS)
def held(request: pytest.FixtureRequest, folder: Path) -> Held:
    return hold(request.param, folder)


def hold(form: str, folder: Path) -> Held:
    path = checkpoint(folder, CASES["Flux"])
    other = folder / f"{form}.safetensors"
    if form == "bfloat16 to float16":
        save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, other)
    elif form == "diffusers' names":
        as_diffusers(path, other)
    elif form == "scaled fp8":
        quantise(path, other, OLD_SCALED_FP8)
    return Held(form, other if other.exists() else path)


def test_sizes_are_those_of_comfyui(held: Held) -> None:
    assert held.own_bytes == 0 and held.in_memory == []
    assert held.patcher.model_size() == held.stock.model_size()
    assert [(name, one.dtype, one.shape) for name, one in held.patcher.model.named_parameters()] == [
        (name, one.dtype, one.shape) for name, one in held.stock.model.named_parameters()
    ]


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("part", [1.0, 0.5])
def test_they_go_and_come_back_as_comfyuis(held: Held, patched: bool, part: float) -> None:
    untouched = result(held.stock)
    assert same(result(held.patcher), untouched)
    mine, theirs = (with_patches(one, held.mapped, patched) for one in (held.patcher, held.stock))
    for _ in range(2):
        for one in (mine, theirs):
            one.partially_load(GPU, int(part * one.model_size()) + 1)
        assert mine.loaded_size() == theirs.loaded_size()
        assert same(result(mine), result(theirs))
        if part == 1.0:
            for name, weight in values(theirs).items():
                assert same(values(mine)[name], weight), name
            assert len(held.in_memory) == len(list(mine.model.named_parameters()))
        for one in (mine, theirs):
            one.detach()
        assert held.in_memory == []
        assert same(result(held.patcher), untouched)


@pytest.mark.parametrize("patched", [False, True])
def test_they_leave_in_part(held: Held, patched: bool) -> None:
    both = [with_patches(one, held.mapped, patched) for one in (held.patcher, held.stock)]
    for one in both:
        one.partially_load(GPU, 10**12)
    assert same(*map(result, both))
    for one in both:
        assert one.partially_unload(CPU, one.model_size() // 2) > 0
    assert len(held.in_memory) < len(held.patcher.weights.tensors)
    # ComfyUI computes with weights of 8 bits in another way where they are not on the GPU, and stock has others there.
    exact = "fp8" not in held.form
    assert not exact or same(*map(result, both))
    for one in both:
        one.partially_load(GPU, 10**12)
    assert not exact or same(*map(result, both))
    both[0].detach()
    assert held.in_memory == []


@pytest.mark.parametrize("form", [form for form in FORMS if form != "scaled fp8"])  # with which ComfyUI fails
def test_a_scheduled_lora_comes_and_goes(form: str, folder: Path) -> None:
    held = hold(form, folder)
    for part in (1.0, 0.5):
        found = []
        for one in (held.patcher.clone(), held.stock.clone()):
            one.partially_load(GPU, int(part * one.model_size()) + 1)
            before = result(one)
            hook = comfy.hooks.WeightHook()
            hooks = comfy.hooks.HookGroup()
            hooks.add(hook)
            one.add_hook_patches(hook, patches_for(held.mapped), 0.8)
            one.patch_hooks(hooks)
            found.append(result(one))
            one.patch_hooks(None)
            assert same(result(one), before)
            one.clean_hooks()
            one.detach()
        assert same(*found)
        assert held.in_memory == []


def test_other_patches_start_from_the_file(folder: Path) -> None:
    held = hold("bfloat16 to float16", folder)
    patched = with_patches(held.patcher, held.mapped, True)
    results = []
    for one in (held.patcher, patched, held.patcher, patched):
        one.partially_load(GPU, 10**12)
        results.append(result(one))
    assert same(results[0], results[2]) and same(results[1], results[3])
    assert not close(results[0], results[1])


def test_nothing_is_pinned(folder: Path) -> None:
    held = hold("the file's dtype", folder)
    held.patcher.pin_weight_to_device(next(iter(held.patcher.weights.tensors)))
    assert not held.patcher.pinned


def test_a_full_load_reads_in_the_order_of_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, addresses = hold("float32 to float16", folder), []
    read = FileWeight.read

    def noted(self: FileWeight, *args: Any) -> Tensor:
        addresses.extend(part.data_ptr() for part in self.file_tensors)
        return read(self, *args)

    monkeypatch.setattr(FileWeight, "read", noted)
    held.patcher.partially_load(GPU, 10**12)
    assert addresses == sorted(addresses)
    assert len(addresses) == len(held.patcher.weights.tensors)


class Run:
    """What a worker has of a run."""

    def __init__(self) -> None:
        self.events: list[LoadProgress] = []
        self.phases: list[str] = []
        self.cancel_requested = False
        self.enter = self.phases.append

    def emit(self, event: LoadProgress) -> None:
        self.events.append(event)


class Recipe:
    name = "flux"


class Cancelled(BaseException):
    """As of all ranks."""


def test_progress_is_told_until_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_progress, "_INTERVAL_S", 0.0)
    held, run = hold("float32 to float16", folder), Run()
    with load_progress.for_run(run, Recipe()):
        held.patcher.partially_load(GPU, 10**12)
    total = sum(weight.file_bytes for weight in held.patcher.weights.tensors.values())
    assert {(event.name, event.total_bytes) for event in run.events} == {("flux", total)}
    done = [event.done_bytes for event in run.events]
    assert done == sorted(done) and done[0] < total and done[-1] == total
    assert len(run.phases) == len(run.events) and run.phases[0].startswith("reading flux (0.0")


@pytest.mark.parametrize("part", [2.0, 0.5])
def test_a_cancel_ends_the_reading_of_this_rank_then_all_agree(part: float, folder: Path) -> None:
    held, run, agreed = hold("float32 to float16", folder), Run(), []
    size = int(part * held.patcher.model_size())

    def check() -> None:
        agreed.append(len(held.in_memory))
        if run.cancel_requested:
            raise Cancelled

    with load_progress.for_run(run, Recipe()), cancellation_checked_by(check):
        run.cancel_requested = True
        with pytest.raises(Cancelled):
            held.patcher.partially_load(GPU, size)
        run.cancel_requested = False
        assert agreed == [0] and held.patcher.loaded_size() == 0
        held.patcher.partially_load(GPU, size)
    assert len(agreed) == 2
    assert held.patcher.loaded_size() > 0


def with_patches(patcher: Any, mapped: MappedModel, patched: bool) -> Any:
    patcher = patcher.clone()
    if patched:
        patcher.add_patches(patches_for(mapped), 0.8)
    return patcher


def result(patcher: ModelPatcher) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    latent, context = torch.randn(1, 16, 8, 6, generator=generator), torch.randn(1, 5, 160, generator=generator)
    y = torch.randn(1, 96, generator=generator)
    return patcher.model.apply_model(latent, torch.tensor([0.7]), c_crossattn=context, y=y)


def values(patcher: ModelPatcher) -> dict[str, Tensor]:
    return {
        name: weight.dequantize() if hasattr(weight, "dequantize") and hasattr(weight, "_qdata") else weight
        for name, weight in patcher.model.named_parameters()
    }


def same(actual: Tensor, wanted: Tensor) -> bool:
    return actual.dtype == wanted.dtype and torch.equal(actual.float(), wanted.float())


def close(actual: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(actual, wanted, atol=2e-2 * wanted.abs().max().item())
