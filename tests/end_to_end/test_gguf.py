"""GGUF files on workers: sampling with split tokens, LoRAs that come and go, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import comfy.model_management
import comfy.sd
import gguf
import pytest
import torch
from comfy_cases import CASES, checkpoint, sample, sample_on_workers
from gguf_cases import stock
from gguf_files import PACK, write_gguf
from loras import KINDS, lora_for
from safetensors.torch import load_file, save_file

from raylight.cluster.config import SessionConfig
from raylight.driver import api
from raylight.host.recipe import OFFLOADED, REPLICATED, SHARDED, LoraRecipe, ModelRecipe, RayModel, WorkerConfig
from raylight.parallel.mesh import MeshShape

WORKERS = WorkerConfig(SessionConfig(MeshShape(ulysses=2), "cpu"), "TORCH")
CASE = CASES["Flux"]
STRENGTHS = (0.8, -0.6)
FIRST = "double_blocks.0.img_attn.qkv.weight"


def model_of(path: Path, sharding: str = REPLICATED, *loras: LoraRecipe, pack: str = PACK) -> RayModel:
    return RayModel(WORKERS, ModelRecipe.of(str(path), "default", sharding, loras, pack))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("gguf")
    comfy.model_management.unload_all_models()


@pytest.fixture(scope="module")
def source(folder: Path) -> Path:
    return checkpoint(folder, CASE)


@pytest.fixture(scope="module")
def good(folder: Path, source: Path) -> Path:
    write_gguf(source, folder / "good.gguf", "Q8_0", "flux")
    return folder / "good.gguf"


@pytest.fixture(scope="module")
def loras(folder: Path, source: Path) -> tuple[Path, ...]:
    shapes = {f"diffusion_model.{key}": tuple(tensor.shape) for key, tensor in load_file(source).items()}
    paths = (folder / "one.safetensors", folder / "two.safetensors")
    for index, (path, kinds) in enumerate(zip(paths, (("lora",), KINDS), strict=True)):
        save_file(lora_for(shapes, kinds, index), path)
    return paths


@pytest.fixture(scope="module")
def expected(good: Path, loras: tuple[Path, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of ComfyUI, without and with the LoRAs."""
    plain = sample(stock(good), CASE)
    patcher = stock(good)
    for path, strength in zip(loras, STRENGTHS, strict=True):
        patcher, _ = comfy.sd.load_lora_for_models(patcher, None, load_file(path), strength, 0)
    return plain, sample(patcher, CASE)


@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED, OFFLOADED])
def test_sampling_with_other_loras_in_turn(
    sharding: str, good: Path, loras: tuple[Path, ...], expected, folder: Path, report_parity
) -> None:
    path = Path(shutil.copy(good, folder / f"{sharding}.gguf"))
    applied = [LoraRecipe.of(str(one), strength) for one, strength in zip(loras, STRENGTHS, strict=True)]
    plain, both = api.load(model_of(path, sharding)), api.load(model_of(path, sharding, *applied))
    first = sample(plain, CASE)
    path.unlink()
    patched = sample(both, CASE)
    errors = [
        ((one - other).abs().max() / other.std()).item() for one, other in zip((first, patched), expected, strict=True)
    ]
    report_parity(
        f"Flux, GGUF, {sharding:<10} 2 workers   max error {errors[0]:.1e}, with two LoRAs {errors[1]:.1e} "
        f"of the standard deviation"
    )
    assert max(errors) <= 1e-4
    assert (expected[1] - expected[0]).std() > 0.05 * expected[0].std()
    assert torch.equal(sample(plain, CASE), first)


@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
def test_a_tensor_in_excess_is_logged_and_left_out(
    sharding: str, source: Path, folder: Path, expected, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / f"more-{sharding}.gguf"
    write_gguf(source, path, "Q8_0", "flux", more={"double_blocks.0.third.weight": torch.zeros(32, 32)})
    actual = sample_on_workers(model_of(path, sharding), CASE)
    assert ((actual - expected[0]).abs().max() / expected[0].std()).item() <= 1e-4
    assert caplog.text.count("unet unexpected: double_blocks.0.third.weight") == 1


def cut(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def not_gguf(path: Path, source: Path) -> None:
    shutil.copy(source, path)


def garbled(path: Path, _: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8:40] = b"\xff" * 32  # the counts of tensors and fields
    path.write_bytes(content)


def of_another_architecture(path: Path, source: Path) -> None:
    write_gguf(source, path, "Q8_0", "llama")


def of_something_else(path: Path, source: Path) -> None:
    save_file({"some.weight": torch.zeros(4, 32)}, path.with_suffix(".safetensors"))
    write_gguf(path.with_suffix(".safetensors"), path, "Q8_0", "flux")


def lacking(name: str) -> Callable[[Path, Path], None]:
    return lambda path, source: write_gguf(source, path, "Q8_0", "flux", without=name)


def misshapen(path: Path, source: Path) -> None:
    write_gguf(source, path, "Q8_0", "flux", more={FIRST: torch.zeros(96, 32)})


@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, "ComfyUI-GGUF cannot read it"),
        (not_gguf, "ComfyUI-GGUF cannot read it: ValueError: GGUF magic invalid"),
        (garbled, "ComfyUI-GGUF cannot read it"),
        (of_another_architecture, "ComfyUI-GGUF cannot read it: .* architecture.* '?llama"),
        (of_something_else, "ComfyUI knows no diffusion model with such tensors"),
        (lacking(FIRST), rf"the tensor {FIRST} is missing"),
        (lacking(FIRST.replace("weight", "bias")), r"the tensor double_blocks\.0\.img_attn\.qkv\.bias is missing"),
        (lacking("double_blocks.0.img_attn.norm.query_norm.weight"), r"the tensor \S+query_norm\S+ is missing"),
        (misshapen, rf"the tensor {FIRST} is \(96, 32\), and the model wants"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_rejects(
    spoil: Callable[[Path, Path], None], message: str, sharding: str, good: Path, source: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(good, tmp_path / "bad.gguf"))
    spoil(path, source)
    with pytest.raises(ValueError, match=rf"(?s)bad\.gguf cannot be loaded as a diffusion model: .*{message}"):
        api.load(model_of(path, sharding))
    api.load(model_of(good, sharding))


def test_rejects_a_pack_that_is_not_there(good: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ComfyUI-GGUF is not in .* on the machine of this worker"):
        api.load(model_of(good, pack=str(tmp_path / "gone")))


@pytest.mark.parametrize(
    ("module", "old", "new", "message"),
    [
        ("loader.py", "def gguf_sd_loader", "def read", "loader.py of ComfyUI-GGUF in .* has no gguf_sd_loader"),
        (
            "ops.py",
            "class GGMLTensor",
            "import nothing_of_this_name\nclass GGMLTensor",
            "ops.py of ComfyUI-GGUF in .* cannot be imported: No module named 'nothing_of_this_name'|"
            "loader.py of ComfyUI-GGUF in .* cannot be imported: No module named 'nothing_of_this_name'",
        ),
        (
            "ops.py",
            'getattr(tensor, "patches"',
            'getattr(tensor, "changes"',
            "take LoRAs in a way that Raylight does not",
        ),
        (
            "ops.py",
            "def get_weight(self",
            "def get_weight(this, self",
            "the layers of ComfyUI-GGUF in .* cannot be used",
        ),
    ],
)
def test_rejects_a_pack_that_has_changed(
    module: str, old: str, new: str, message: str, good: Path, tmp_path: Path
) -> None:
    pack = tmp_path / "pack"
    shutil.copytree(PACK, pack)
    text = (pack / module).read_text()
    assert old in text
    (pack / module).write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        api.load(model_of(good, pack=str(pack)))


def test_rejects_a_dtype_and_a_comfyui_without_the_pack(good: Path) -> None:
    with pytest.raises(ValueError, match="weight_dtype = bf16 is not for good.gguf.* Choose default"):
        ModelRecipe.of(str(good), "bf16", gguf_pack=PACK)
    with pytest.raises(ValueError, match="good.gguf is a GGUF file, which needs the custom node ComfyUI-GGUF"):
        ModelRecipe.of(str(good), "default")


def test_weights_of_a_good_file_are_read_as_written(good: Path) -> None:
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(good).tensors} == {"Q8_0", "F16", "F32"}
