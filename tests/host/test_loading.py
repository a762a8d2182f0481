"""Model files as users have them: with left-overs, bytes between tensors, lost scales; and files of something else."""

from __future__ import annotations

import ctypes
import json
import logging
import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import comfy.utils
import pytest
import torch
from diffusers_names import as_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from raylight.dev.demo.tiny import write_checkpoint
from raylight.host import loading, tensor_file
from raylight.host.checkpoint import MappedModel
from raylight.host.recipe import LoraRecipe, ModelRecipe

Tensors = dict[str, Tensor]
FP8 = torch.float8_e4m3fn
MARKER = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    path = tmp_path_factory.mktemp("source") / "wan.safetensors"
    write_checkpoint(path, "wan-t2v", heads=3)
    return load_file(path)


def mapped(path: Path) -> MappedModel:
    return loading.map_file(ModelRecipe.of(str(path), "default"))


def in_8_bits(tensors: Tensors) -> Tensors:
    return {
        name: tensor.to(FP8) if tensor.ndim == 2 and "blocks" in name and name.endswith("weight") else tensor
        for name, tensor in tensors.items()
    }


def with_scales(
    tensors: Tensors, leaf: str, scale: Callable[[Tensor], Tensor] = lambda _: torch.tensor(0.02)
) -> Tensors:
    tensors = in_8_bits(tensors)
    return tensors | {
        name.removesuffix("weight") + leaf: scale(tensor) for name, tensor in tensors.items() if tensor.dtype == FP8
    }


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + name: tensor.clone() for name, tensor in tensors.items()}


EXCESS: dict[str, Tensors] = {
    "a norm (Lumina 2, Z-Image)": {"norm_final.weight": torch.ones(384)},
    "tables (Anima, Cosmos)": {
        "pos_embedder.dim_spatial_range": torch.arange(21) / 42.0,
        "pos_embedder.seq": torch.arange(240.0),
    },
    "a basis (MiniMax H3)": {"adaln_basis": torch.zeros(8, 384), "adaln_mean": torch.zeros(384)},
    "an extension": {"mm_in.0.weight": torch.zeros(384, 384), "cam_encoder.weight": torch.zeros(384, 12)},
    "a flag": {"model_type.SkyReels-V2": torch.zeros(1)},
    "a marker without its layer": {"blocks.7.ffn.0.comfy_quant": MARKER},
    "scales of 16-bit weights": {
        "blocks.0.ffn.0.weight_scale": torch.tensor(0.3),
        "blocks.0.ffn.0.input_scale": torch.tensor(0.3),
    },
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", EXCESS)
def test_tensors_in_excess_are_logged_in_one_line(
    tensors: Tensors, tmp_path: Path, name: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "file.safetensors"
    save_file(prefixed(tensors | EXCESS[name], prefix), path)
    with caplog.at_level(logging.WARNING):
        found = mapped(path)
    assert set(found.unused) == set(EXCESS[name])
    assert all(
        torch.equal(parameter, tensors[key]) for key, parameter in found.model.diffusion_model.named_parameters()
    )
    assert [record.getMessage() for record in caplog.records] == [
        f"file.safetensors is loaded without {len(EXCESS[name])} of its tensors, for which WanModel has no place "
        f"(unet unexpected: {', '.join(found.unused)})"
    ]


def test_many_in_excess_are_counted(tensors: Tensors, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "file.safetensors"
    save_file(tensors | {f"extra.{index}": torch.zeros(2) for index in range(300)}, path)  # more tensors than it has
    mapped(path)
    (line,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert "without 300 of its tensors" in line and line.endswith("and 295 more)") and len(line) < 300


def test_refuses_a_file_of_which_most_has_no_place(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "twins.safetensors"
    save_file(tensors | prefixed(tensors, "twin.") | {"twin.more": torch.zeros(3)}, path)
    with pytest.raises(
        ValueError,
        match=r"twins\.safetensors .* most of it \(50%, in 70 tensors: twin\..* has no "
        r"place in WanModel",
    ):
        mapped(path)
    save_file(tensors | prefixed(tensors, "twin."), path)  # half of it
    assert len(mapped(path).unused) == len(tensors)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("leaf", "scale"),
    [
        ("weight_scale", lambda _: torch.tensor(0.02)),
        ("scale_weight", lambda _: torch.tensor([0.02])),
        ("weight_scale", lambda weight: torch.rand(weight.shape[0], 1)),
        ("scale_input", lambda _: torch.tensor(0.02)),
        ("input_scale", lambda _: torch.tensor(0.02)),
        ("weight_scale_inv", lambda _: torch.rand(3, 3)),
        ("weight.scale", lambda _: torch.tensor(0.02)),
    ],
)
def test_refuses_8_bit_weights_that_lose_their_scales(
    tensors: Tensors, tmp_path: Path, leaf: str, scale: Callable[[Tensor], Tensor], prefix: str
) -> None:
    path = tmp_path / "noise.safetensors"
    save_file(prefixed(with_scales(tensors, leaf, scale), prefix), path)
    with pytest.raises(
        ValueError,
        match=r"noise\.safetensors .* weights of 8 bits with scales that ComfyUI does not "
        rf"know \(.*{leaf}",
    ):
        mapped(path)


def test_refuses_a_quantised_layer_among_marked_ones_that_has_no_marker(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "partly.safetensors"
    save_file(with_scales(tensors, "weight_scale") | {"blocks.0.ffn.0.comfy_quant": MARKER}, path)
    with pytest.raises(ValueError, match=r"weights of 8 bits with scales .*and 14 more"):
        mapped(path)


def test_scales_of_one_may_be_lost(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "ones.safetensors"
    save_file(with_scales(tensors, "scale_weight", lambda _: torch.tensor(1.0)), path)
    assert len(mapped(path).unused) == 20


def test_refuses_lost_scales_in_the_layout_of_diffusers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(tmp_path / "flux.safetensors", "flux-dev", heads=3)
    path = tmp_path / "diffusers.safetensors"
    as_diffusers(tmp_path / "flux.safetensors", path)
    tensors = load_file(path)
    save_file(tensors | {"left.over": torch.zeros(9)}, path)
    assert mapped(path).unused == ("left.over",)
    assert "(unet unexpected: left.over)" in caplog.text
    name = "transformer_blocks.0.attn.to_q"
    save_file(
        tensors | {f"{name}.weight": tensors[f"{name}.weight"].to(FP8), f"{name}.weight_scale": torch.tensor(0.1)}, path
    )
    with pytest.raises(ValueError, match=rf"weights of 8 bits with scales that ComfyUI does not know \({name}\."):
        mapped(path)


def with_tail(content: bytes) -> bytes:
    return content + bytes(7)


def with_hole(content: bytes) -> bytes:
    """Three bytes before the first tensor, so that no tensor is where its dtype would have it."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [3 + offset for offset in entry["data_offsets"]]
    changed = json.dumps(header).encode()
    return struct.pack("<Q", len(changed)) + changed + bytes(3) + content[8 + length :]


@pytest.mark.parametrize("change", [with_tail, with_hole])
def test_bytes_of_no_tensor(
    tensors: Tensors, tmp_path: Path, change: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.safetensors"
    save_file(tensors | {"eight": torch.arange(4.0).to(FP8)}, path, metadata={"made": "here"})
    path.write_bytes(change(path.read_bytes()))
    read = tensor_file.tolerant_reader(comfy.utils.load_torch_file)(str(path), return_metadata=True)
    expected = _by_comfyui_with_dynamic_vram(path, monkeypatch)
    assert read[1] == expected[1] == {"made": "here"}
    assert read[0].keys() == expected[0].keys()
    assert all(torch.equal(tensor.float(), expected[0][name].float()) for name, tensor in read[0].items())
    with open("/proc/self/maps") as maps:  # one copy for all processes
        assert str(path) in maps.read()
    found = mapped(path).model.diffusion_model
    assert all(torch.equal(parameter, tensors[name]) for name, parameter in found.named_parameters())


def _by_comfyui_with_dynamic_vram(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensors, dict[str, str]]:
    """What ComfyUI's own parser makes of a file, which maps it by a library that needs a GPU."""
    if not hasattr(comfy.utils, "load_safetensors"):
        pytest.skip("this ComfyUI has no parser of its own")
    import comfy_aimdo.model_mmap

    class Map:
        def __init__(self, name: str) -> None:
            with open(name, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

        def get_file_handle(self) -> SimpleNamespace:
            return SimpleNamespace()

        def get(self) -> int:
            return ctypes.addressof(ctypes.c_uint8.from_buffer(self._map))

    monkeypatch.setattr(comfy_aimdo.model_mmap, "ModelMMAP", Map)
    return comfy.utils.load_safetensors(str(path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda content: content[:-7], "not fully covered"),
        (lambda _: b"", "header too small"),
        (lambda _: b"<html>" * 900, "header too large"),
        (lambda content: content.replace(b'"F32"', b'"F31"', 1), "cannot be loaded"),
        (lambda content: struct.pack("<Q", len(content)) + content[8:], "cannot be loaded"),
    ],
)
def test_refuses_damaged_safetensors(
    tensors: Tensors, tmp_path: Path, content: Callable[[bytes], bytes], words: str
) -> None:
    path = tmp_path / "damaged.safetensors"
    save_file(tensors, path)
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(
        ValueError,
        match=rf"damaged\.safetensors cannot be loaded as a diffusion model: .*{words}|"
        rf"damaged\.safetensors {words} as a diffusion model",
    ):
        mapped(path)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1, "b": {"c": 2}}, torch.zeros(3), {}])
def test_refuses_pickles_of_something_else(tmp_path: Path, content: object) -> None:
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"other\.pt cannot be loaded as a diffusion model"):
        mapped(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(40)])
def test_refuses_what_is_no_pickle(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.pt cannot be loaded as a diffusion model"):
        mapped(path)


@pytest.mark.parametrize("of", [lambda path: ModelRecipe.of(path, "default"), lambda path: LoraRecipe.of(path, 1.0)])
def test_a_file_written_in_place_with_its_old_time_has_another_recipe(
    tmp_path: Path, of: Callable[[str], object]
) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(b"before")
    before, status = of(str(path)), path.stat()
    assert of(str(path)) == before
    with open(path, "r+b") as file:
        file.write(b"behind")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert of(str(path)) != before
