"""The loader node with and without ComfyUI-GGUF in the same ComfyUI."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import folder_paths
import own_pack
import pytest

import nodes as comfy_nodes
from raylight.host import gguf

PACK = own_pack.ROOT / "tests" / "support" / "gguf_pack"


@pytest.fixture(scope="module")
def loader() -> Any:
    return own_pack.load()["RayUNETLoader"]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A GGUF file in a models folder."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for name, extensions in (("diffusion_models", {".safetensors"}), ("checkpoints", {".safetensors"})):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path)], extensions))
    monkeypatch.delitem(comfy_nodes.NODE_CLASS_MAPPINGS, gguf.NODE, raising=False)
    return "model.gguf"


@pytest.fixture
def installed(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = importlib.import_module(f"{gguf.open_pack(str(PACK)).name}.nodes")
    monkeypatch.setitem(comfy_nodes.NODE_CLASS_MAPPINGS, gguf.NODE, nodes.UnetLoaderGGUF)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "unet_gguf", ([str(tmp_path)], {".gguf"}))


def options(loader: Any) -> list[str]:
    return loader.INPUT_TYPES()["required"]["unet_name"][1]["options"]


def test_validation_without_pack(loader: Any, model: str) -> None:
    assert gguf.find() == ""
    assert model not in options(loader)
    message = loader.validate_inputs(unet_name=model)
    assert "model.gguf is a GGUF file, which needs the custom node ComfyUI-GGUF" in message
    with pytest.raises(ValueError, match="needs the custom node ComfyUI-GGUF"):
        loader.execute(model, "default", SimpleNamespace(sharding="replicated"))


def test_lists_files_with_pack(loader: Any, model: str, installed: None) -> None:
    assert gguf.find() == str(PACK)
    assert options(loader) == [model]
    assert loader.validate_inputs(unet_name=model) is True
    with pytest.raises(ValueError, match="weight_dtype = fp8_e4m3fn is not for model.gguf"):
        loader.execute(model, "fp8_e4m3fn", SimpleNamespace(sharding="replicated"))


def test_linked_or_unknown_name(loader: Any, installed: None) -> None:
    assert loader.validate_inputs() is True
    assert loader.validate_inputs(unet_name="gone.gguf") == "there is no model file gone.gguf"
    assert loader.validate_inputs(unet_name="gone.safetensors") == "there is no model file gone.safetensors"


def test_ignores_node_of_other_pack(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        comfy_nodes.NODE_CLASS_MAPPINGS, gguf.NODE, type("UnetLoaderGGUF", (), {"__module__": __name__})
    )
    assert gguf.find() == ""
