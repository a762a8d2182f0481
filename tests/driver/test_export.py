"""Models exported from ComfyUI's memory, built again from the file that workers map, against the originals."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import tempfile
import weakref
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.sd
import psutil
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_cases import CASES, checkpoint
from diffusers_names import as_diffusers
from gguf_cases import stock as stock_gguf
from gguf_files import write_gguf
from loaded_cases import CPU, wan_inputs
from loras import lora_for
from quantised import FORMATS, quantise

from raylight.cluster.config import SessionConfig
from raylight.dev.demo.tiny import write_checkpoint
from raylight.driver import memory_file, model_import, stock_weights
from raylight.driver.export import export, gguf_folder
from raylight.driver.stock_weights import weights_differ
from raylight.host import machine_memory
from raylight.host.loading import map_file
from raylight.host.recipe import REPLICATED, SHARDED, ModelRecipe, WorkerConfig
from raylight.host.settings import PACK_ROOT
from raylight.parallel.mesh import MeshShape
from raylight.worker.replicated_patcher import build_replicated

pytestmark = pytest.mark.slow
WORKERS = WorkerConfig(SessionConfig(MeshShape(ulysses=2), "cpu"), "TORCH")
LINEAR = "blocks.0.ffn.0.weight"
TOLERANCE = 1e-5
HEADS = 2  # one quantised format wants widths that divide by 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exporting")


@pytest.fixture(scope="module")
def wan(folder: Path) -> Path:
    write_checkpoint(folder / "wan.safetensors", "wan-t2v", heads=HEADS)
    return folder / "wan.safetensors"


@pytest.fixture
def model(wan: Path) -> ModelPatcher:
    return comfy.sd.load_diffusion_model(str(wan))


def quantised(folder: Path, wan: Path, form: str) -> ModelPatcher:
    path = folder / f"{FORMATS.index(form)}.safetensors"
    quantise(wan, path, form)
    return comfy.sd.load_diffusion_model(str(path))


def built(recipe: ModelRecipe) -> Any:
    patcher, _ = build_replicated(map_file(recipe), CPU)
    patcher.partially_load(CPU, 10**12)
    return patcher


def error(patcher: Any, expected: torch.Tensor) -> float:
    """In standard deviations."""
    return ((patcher.model.apply_model(**wan_inputs()) - expected).abs().max() / expected.std()).item()


@pytest.mark.parametrize(
    "form",
    [
        pytest.param("float32", marks=pytest.mark.smoke),
        "bfloat16",
        "float8_e4m3fn",
        pytest.param("gguf", marks=pytest.mark.smoke),
        *FORMATS,
    ],
)
def test_a_model_is_the_same_when_it_is_built_again(form: str, folder: Path, wan: Path) -> None:
    with torch.inference_mode():
        if form == "gguf":
            write_gguf(wan, folder / "wan.gguf", "Q8_0", "wan")
            model = stock_gguf(folder / "wan.gguf")
        elif form in FORMATS:
            model = quantised(folder, wan, form)
        else:
            model = comfy.sd.load_diffusion_model(str(wan), {"dtype": getattr(torch, form)})
        expected = model.model.apply_model(**wan_inputs())
        recipe, file = export(model)
        mapped = map_file(recipe)
        assert weights_differ(model, mapped.model) == []
        assert type(mapped.model) is type(model.model)
        kept = {name: weight.dtype for name, weight in model.model.named_parameters()}
        assert kept == {name: weight.dtype for name, weight in mapped.model.named_parameters()}
        again = built(recipe)
        # Where activations are quantised the last digit of a product, which its place in memory decides, is one step.
        assert error(again, expected) <= (0.02 if form == "int8_tensorwise" else TOLERANCE)
        stored = {
            name: stock_weights.plain_tensors(weight) for name, weight in stock_weights.weights(model.model).items()
        }
        for name, weight in stock_weights.weights(mapped.model).items():
            assert all(
                torch.equal(part.view(torch.uint8), stored[name][one].view(torch.uint8))
                for one, part in stock_weights.plain_tensors(weight).items()
                if part.ndim
            ), name
    file.close()


@pytest.mark.smoke
def test_it_has_the_weights_without_patches(model: ModelPatcher) -> None:
    shapes = {name: tuple(weight.shape) for name, weight in model.model.named_parameters()}
    expected = model.model.apply_model(**wan_inputs())
    lora = lora_for(shapes, ["lora", "loha"], 1)
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0)
    patched.add_object_patch("diffusion_model.blocks.0.forward", lambda x, **_: x)
    patched.patch_model(CPU)
    assert not torch.equal(patched.model.apply_model(**wan_inputs()), expected)
    as_patched = patched.model.state_dict()
    recipe, file = export(patched)
    assert error(built(recipe), expected) <= TOLERANCE
    after = patched.model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in as_patched.items()), "the model was changed"
    file.close()


def in_one_row(weight: torch.Tensor) -> None:
    weight[7] += 1


def in_one_column(weight: torch.Tensor) -> None:
    weight[:, 7] += 1


def in_one_place_of_a_small_one(weight: torch.Tensor) -> None:
    weight.view(-1)[5] += 1


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (torch.Tensor.zero_, LINEAR),
        (in_one_row, LINEAR),
        (in_one_column, LINEAR),
        (in_one_place_of_a_small_one, "blocks.1.modulation"),
        (in_one_place_of_a_small_one, "head.head.bias"),
    ],
)
def test_a_change_of_a_weight_is_noticed(change: Any, name: str, model: ModelPatcher, wan: Path) -> None:
    base = map_file(ModelRecipe.of(str(wan), "default")).model
    before = model_import.recipe_of(model, WORKERS)
    assert weights_differ(model, base) == []
    assert model.model.diffusion_model.get_parameter(LINEAR).numel() > 1 << 16, "all of it is looked at"
    with torch.no_grad():
        change(model.model.diffusion_model.get_parameter(name))
    assert weights_differ(model, base) == [name]
    assert before.export is None
    assert model_import.recipe_of(model, WORKERS).export is not None


def test_what_a_loader_converts_is_no_change(folder: Path, wan: Path) -> None:
    for weight_dtype in ("bf16", "fp8_e4m3fn", "fp8_e5m2"):
        options = {
            "dtype": {"bf16": torch.bfloat16, "fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[
                weight_dtype
            ]
        }
        model = comfy.sd.load_diffusion_model(str(wan), options)
        assert model_import.recipe_of(model, WORKERS) == ModelRecipe.of(str(wan), weight_dtype)
    for form in FORMATS:
        assert model_import.recipe_of(quantised(folder, wan, form), WORKERS).export is None
    # Of diffusers' names, of which ComfyUI joins several to one weight.
    as_diffusers(checkpoint(folder, CASES["Flux"]), folder / "diffusers.safetensors")
    model = comfy.sd.load_diffusion_model(str(folder / "diffusers.safetensors"))
    assert model_import.recipe_of(model, WORKERS).export is None
    with torch.no_grad():
        model.model.diffusion_model.double_blocks[1].img_attn.qkv.weight[-1] += 1
    assert model_import.recipe_of(model, WORKERS).export is not None


def test_another_dtype_is_a_change(model: ModelPatcher) -> None:
    model.model.diffusion_model.get_submodule("blocks.0.ffn").to(torch.bfloat16)
    recipe = model_import.recipe_of(model, WORKERS)
    assert recipe.export is not None
    assert map_file(recipe).model.diffusion_model.get_parameter(LINEAR).dtype == torch.bfloat16


def test_a_model_is_exported_once_and_no_longer_than_it_lives(wan: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = comfy.sd.load_diffusion_model(str(wan))
    model.cached_patcher_init = None
    with caplog.at_level(logging.INFO, "raylight"):
        recipe = model_import.recipe_of(model, WORKERS)
        comfy.sd.load_lora_for_models(
            model,
            None,
            lora_for({name: tuple(weight.shape) for name, weight in model.model.named_parameters()}, ["lora"], 1),
            1,
            0,
        )
        again = model_import.recipe_of(model.clone(), WorkerConfig(WORKERS.config, "TORCH", sharding=SHARDED))
    assert caplog.text.count("from ComfyUI's memory") == 1
    assert "GB once for all of them, in shared memory" in caplog.text
    assert (again.path, again.export, again.sharding) == (recipe.path, recipe.export, SHARDED)
    status = os.stat(recipe.path)
    assert recipe.is_there and status.st_mode & 0o777 == 0o400
    with pytest.raises(OSError), open(recipe.path, "r+b", buffering=0) as file:
        file.write(b"x")
    with torch.no_grad():
        model.model.diffusion_model.get_parameter(LINEAR).mul_(2)
    other = model_import.recipe_of(model, WORKERS)
    assert other != recipe
    assert not recipe.is_there and other.is_there
    with pytest.raises(ValueError, match="have gone with the model that they were of"):
        map_file(recipe)
    gone = weakref.ref(model.model)
    del model
    gc.collect()
    assert gone() is None
    assert not other.is_there


def test_where_memory_is_short_a_file_without_a_name_takes_it(
    model: ModelPatcher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9, total=10**10))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    expected = model.model.apply_model(**wan_inputs())
    with caplog.at_level(logging.INFO, "raylight"):
        recipe, file = export(model)
    assert f"in an unnamed file in {tmp_path}, as memory has too little room (1.00 GB of memory" in caplog.text
    assert list(tmp_path.iterdir()) == []
    assert error(built(recipe), expected) <= TOLERANCE
    file.close()
    monkeypatch.setattr(memory_file.shutil, "disk_usage", lambda _: namedtuple("Usage", ["free"])(1000))
    with pytest.raises(ValueError, match=r"there is no room for 0.0\d GB of weights that all workers share"):
        export(model)


def test_what_is_interrupted_leaves_nothing(model: ModelPatcher) -> None:
    before = set(os.listdir("/proc/self/fd"))
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        export(model)
    assert set(os.listdir("/proc/self/fd")) <= before


WRITES = """
import time
from raylight.driver.memory_file import MemoryFile
file = MemoryFile("test", {size})
file.write(b"x" * {size}, 0)
file.finish()
print(file.path, file.in_memory, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_process_that_is_killed_leaves_nothing(in_memory: bool, tmp_path: Path) -> None:
    code = WRITES.format(size=1 << 16)
    if not in_memory:
        code = "import os\ndel os.memfd_create" + code
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=PACK_ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        path, where = process.stdout.readline().split()
        assert where == str(in_memory)
        content = torch.from_file(path, shared=False, size=1 << 16, dtype=torch.uint8)
        process.kill()
    assert content.eq(ord("x")).all(), "a worker that has it mapped goes on"
    assert not os.path.exists(path)
    assert list(tmp_path.iterdir()) == []


CGROUPS = {
    1: ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    2: ("memory.max", "memory.current", "memory.stat"),
}
UNLIMITED = {1: f"{2**63 - 4096}\n", 2: "max\n"}
STATS = "anon 2\ninactive_file 60000\nactive_file 40000\ntotal_inactive_file 70000\ntotal_active_file 30000\n"


@pytest.mark.parametrize("version", CGROUPS)
def test_a_memory_limit_of_a_container_counts(version: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine_memory, "_CGROUP", str(tmp_path))
    machine = psutil.virtual_memory().available
    assert abs(machine_memory.available_memory() - machine) < 10**9
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9, total=10**10))
    names, limit = CGROUPS[version], tmp_path / CGROUPS[version][0]
    limit.parent.mkdir(exist_ok=True)
    for name, text in zip(names, ("3000000\n", "2500000\n", STATS), strict=True):
        (tmp_path / name).write_text(text)
    assert (machine_memory.available_memory(), machine_memory.total_memory()) == (600000, 3000000)
    limit.write_text(UNLIMITED[version])
    assert (machine_memory.available_memory(), machine_memory.total_memory()) == (10**9, 10**10)


class OfAPack(torch.nn.Linear):
    """A layer that workers do not have."""


def test_refuses_what_workers_cannot_build(model: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    model.cached_patcher_init = None
    elsewhere = WorkerConfig(SessionConfig(MeshShape(), "cpu", address="ray://elsewhere"), "TORCH")
    with pytest.raises(ValueError, match="WAN21 model are in the memory of this ComfyUI .* set ray_cluster_address"):
        model_import.recipe_of(model, elsewhere)
    model.model.diffusion_model.head.head.__class__ = OfAPack
    monkeypatch.setattr(OfAPack, "__module__", "a_pack.nodes")
    with pytest.raises(ValueError, match=r"WAN21 model has a module of the class OfAPack \(a_pack.nodes.OfAPack\)"):
        model_import.recipe_of(model, WORKERS)


def test_a_loader_with_options_of_its_own_is_followed(wan: Path) -> None:
    model = comfy.sd.load_diffusion_model(str(wan), {"dtype": torch.float16, "fp8_optimizations": True})
    assert model_import.recipe_of(model, WORKERS).export is not None


def test_a_file_that_has_gone_or_was_replaced(folder: Path, wan: Path, model: ModelPatcher) -> None:
    path = folder / "copy.safetensors"
    for replace in (path.unlink, lambda: write_checkpoint(path, "wan-t2v", heads=HEADS, seed=1)):
        path.write_bytes(wan.read_bytes())
        model = comfy.sd.load_diffusion_model(str(path))
        assert model_import.recipe_of(model, WORKERS).path == str(path)
        replace()
        recipe = model_import.recipe_of(model, WORKERS)
        assert recipe.export is not None
        with torch.inference_mode():
            assert weights_differ(model, map_file(recipe).model) == []


def test_the_file_of_a_gguf_pack_is_read_where_its_weights_are_still_in_it(folder: Path, wan: Path) -> None:
    path = folder / "mapped.gguf"
    write_gguf(wan, path, "Q8_0", "wan")
    model = stock_gguf(path)
    recipe = model_import.recipe_of(model, WORKERS)
    assert (recipe.path, recipe.export, recipe.sharding) == (str(path), None, REPLICATED)
    other = stock_gguf(path)
    path.unlink()
    assert model_import.recipe_of(other, WORKERS).export is not None
    assert gguf_folder(other.model) == recipe.gguf_pack
