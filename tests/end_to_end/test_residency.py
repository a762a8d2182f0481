"""What workers keep between prompts, and what they release."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy_cases import CASES, checkpoint, sample, sample_on_workers, sample_stock
from loras import KINDS, lora_for
from safetensors.torch import load_file, save_file

from raylight.cluster import active_session
from raylight.cluster.config import SessionConfig
from raylight.driver import api, workers
from raylight.host.recipe import OFFLOADED, REPLICATED, SHARDED, LoraRecipe, ModelRecipe, RayModel, WorkerConfig
from raylight.host.worker_service import WorkerService
from raylight.parallel.mesh import MeshShape

WORKERS = WorkerConfig(SessionConfig(MeshShape(ulysses=2), "cpu"), "TORCH")
WAN, FLUX = CASES["Wan T2V"], CASES["Flux"]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    comfy.model_management.unload_all_models()  # the next test finds workers without models


def write(folder: Path, case, name: str, seed: int = 0) -> Path:
    path = checkpoint(folder, case, seed)
    return Path(shutil.move(path, folder / name))


def write_lora(folder: Path, model: Path, name: str, seed: int, kinds=("lora",)) -> Path:
    shapes = {f"diffusion_model.{key}": tuple(tensor.shape) for key, tensor in load_file(model).items()}
    save_file(lora_for(shapes, kinds, seed), folder / name)
    return folder / name


def model_of(path: Path, sharding: str = REPLICATED, *loras: tuple[Path, float]) -> RayModel:
    recipes = tuple(LoraRecipe.of(str(lora), strength) for lora, strength in loras)
    return RayModel(WORKERS, ModelRecipe.of(str(path), "default", sharding, recipes))


def held() -> tuple[str, ...]:
    session = active_session.session(WORKERS.config, workers.service_spec(WORKERS.config))
    return tuple(model.name for model in session.run(WorkerService.memory).models)


@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED, OFFLOADED])
def test_two_loras_are_those_of_comfyui(sharding: str, folder: Path, report_parity) -> None:
    path = write(folder, WAN, "wan.safetensors")
    loras = (
        (write_lora(folder, path, "one.safetensors", 1), 0.8),
        (write_lora(folder, path, "two.safetensors", 2, KINDS), -0.6),
    )
    expected = sample_stock(path, WAN, loras=loras)
    actual = sample_on_workers(model_of(path, sharding, *loras), WAN)
    error = ((actual - expected).abs().max() / expected.std()).item()
    report_parity(f"Wan T2V, two LoRAs, {sharding:<14} 2 workers   max error {error:.1e} of the standard deviation")
    assert error <= 1e-4
    assert (expected - sample_stock(path, WAN)).std() > 0.05 * expected.std()


@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED, OFFLOADED])
def test_other_models_and_loras_read_no_model_again(sharding: str, folder: Path) -> None:
    wan, flux = write(folder, WAN, "wan.safetensors"), write(folder, FLUX, "flux.safetensors")
    lora = write_lora(folder, wan, "lora.safetensors", 1, KINDS)
    plain = model_of(wan, sharding)
    first = sample_on_workers(plain, WAN)
    strong, weak = model_of(wan, sharding, (lora, 1.0)), model_of(wan, sharding, (lora, 0.4))
    fresh_weak = sample_on_workers(weak, WAN)
    comfy.model_management.unload_all_models()
    api.load(plain)
    other = model_of(flux, sharding)
    of_flux = sample_on_workers(other, FLUX)
    assert held() == ("wan.safetensors", "flux.safetensors")
    of_plain, of_strong, of_weak, of_other = map(
        api.load, (plain, strong, weak, other)
    )  # which reads the file's header
    for path in (wan, flux):
        path.unlink()
    assert torch.equal(sample(of_plain, WAN), first)
    assert not torch.allclose(sample(of_strong, WAN), first, atol=1e-2)
    assert torch.equal(sample(of_weak, WAN), fresh_weak)
    assert torch.equal(sample(of_other, FLUX), of_flux)
    assert torch.equal(sample(of_plain, WAN), first)
    assert held() == ("flux.safetensors", "wan.safetensors")


def test_another_file_under_the_same_name_is_another_model(folder: Path) -> None:
    path = write(folder, FLUX, "flux.safetensors")
    first = sample_on_workers(model_of(path), FLUX)
    write(folder, FLUX, "flux.safetensors", seed=1)
    second = sample_on_workers(model_of(path), FLUX)
    assert torch.allclose(second, sample_stock(path, FLUX), atol=1e-4)
    assert not torch.allclose(second, first, atol=1e-2)


@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
def test_files_written_in_place_with_their_old_time_are_other_files(sharding: str, folder: Path) -> None:
    path, other = write(folder, FLUX, "flux.safetensors"), write(folder, FLUX, "other.safetensors", seed=1)
    loras = [write_lora(folder, path, f"{seed}.safetensors", seed) for seed in (1, 2)]

    def sampled(lora: Path = loras[0]) -> torch.Tensor:
        return sample_on_workers(model_of(path, sharding, (lora, 1.0)), FLUX)

    first = sampled()
    for target, source in ((path, other), (loras[0], loras[1])):
        times = target.stat().st_atime_ns, target.stat().st_mtime_ns
        with target.open("r+b") as file:
            file.write(source.read_bytes())
        os.utime(target, ns=times)
        before, first = first, sampled()
        assert not torch.allclose(first, before, atol=1e-2)
        assert torch.allclose(first, sample_stock(path, FLUX, loras=[(loras[0], 1.0)]), atol=1e-4)


def test_unloading_models_in_comfyui_reaches_the_workers(folder: Path) -> None:
    path = write(folder, FLUX, "flux.safetensors")
    for _ in range(2):  # also after the first time
        result = sample_on_workers(model_of(path), FLUX)
        assert held() == ("flux.safetensors",)
        comfy.model_management.unload_all_models()
        assert held() == ()
    assert torch.equal(sample_on_workers(model_of(path), FLUX), result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda lora: {f"other.{key}": tensor for key, tensor in lora.items()},
            r"lora\.safetensors has no effect on this model: ComfyUI knows none of the names of its \d+ tensors "
            r"\(other\.",
        ),
        (
            lambda lora: {key: tensor[:-1] if "up" in key else tensor for key, tensor in lora.items()},
            r"lora\.safetensors is for another model, or another size of this one: none of its \d+ layers fits "
            r"\(diffusion_model\.blocks\.0\.\S+, here \d+ x \d+",
        ),
    ],
)
@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
def test_rejects_a_lora_for_another_model(sharding: str, change, message: str, folder: Path) -> None:
    path = write(folder, WAN, "wan.safetensors")
    lora = write_lora(folder, path, "lora.safetensors", 1)
    save_file({key: tensor.contiguous() for key, tensor in change(load_file(lora)).items()}, lora)
    with pytest.raises(ValueError, match=message):
        api.load(model_of(path, sharding, (lora, 1.0)))
    api.load(model_of(path, sharding))


def test_rejects_a_damaged_lora(folder: Path) -> None:
    path = write(folder, WAN, "wan.safetensors")
    lora = write_lora(folder, path, "lora.safetensors", 1)
    lora.write_bytes(lora.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"lora\.safetensors cannot be read as a LoRA"):
        api.load(model_of(path, REPLICATED, (lora, 1.0)))
