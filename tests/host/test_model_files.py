"""A file of one machine is found on another by ComfyUI's folders, and compared by content."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import folder_paths
import numpy as np
import pytest

from raylight.host import model_files, other_machine
from raylight.host.model_files import ModelFile

KIND = "diffusion_models"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelFile:
    """Return a file of ComfyUI's machine, in a folder that the other machine, this process from now on, lacks."""
    first = tmp_path / "first"
    (first / "sub").mkdir(parents=True)
    (first / "sub" / "model.safetensors").write_bytes(os.urandom(3 << 20))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, KIND, ([str(first)], {".safetensors"}))
    described = model_files.describe(str(first / "sub" / "model.safetensors"))
    assert (KIND, "sub/model.safetensors") in described.names
    (tmp_path / "second").mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, KIND, ([str(tmp_path / "second")], {".safetensors"}))
    monkeypatch.setenv(model_files.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(model_files, "_elsewhere", {})
    shutil.move(first, tmp_path / "kept")
    return described


def content(tmp_path: Path) -> bytes:
    return (tmp_path / "kept" / "sub" / "model.safetensors").read_bytes()


def put(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def test_by_folder_and_name(file: ModelFile, tmp_path: Path) -> None:
    here = put(tmp_path / "second" / "sub" / "model.safetensors", content(tmp_path))
    assert model_files.find(file).path == here
    assert model_files.here(file.path) == here
    assert model_files.here("another") == "another"


def test_by_the_same_path(file: ModelFile, tmp_path: Path) -> None:
    assert put(Path(file.path), content(tmp_path)) == model_files.find(file).path


@pytest.mark.parametrize("change", ["a byte of the header", "the last byte", "one more byte"])
def test_another_file_of_that_name_is_not_taken(change: str, file: ModelFile, tmp_path: Path) -> None:
    data = bytearray(content(tmp_path))
    if change == "one more byte":
        data.append(0)
    else:
        data[10 if "header" in change else -1] ^= 1
    here = put(tmp_path / "second" / "sub" / "model.safetensors", data)
    found = model_files.find(file)
    assert (found.path, found.other, found.other_size) == ("", here, len(data))
    assert model_files.here(file.path) == file.path


def test_what_is_sent_is_found_from_then_on(file: ModelFile, tmp_path: Path) -> None:
    found = model_files.find(file)
    assert (found.path, found.other, found.cache) == ("", "", str(tmp_path / "cache"))
    assert found.free_bytes > 0
    data = np.frombuffer(content(tmp_path), np.uint8)
    model_files.receive(file, 0, data[: 2 << 20])
    assert model_files.find(file).path == "", "it is complete"
    model_files.receive(file, 2 << 20, data[2 << 20 :])
    here = model_files.find(file).path
    assert Path(here).read_bytes() == content(tmp_path)
    assert os.listdir(tmp_path / "cache") == [Path(here).name]


def test_machines_that_share_the_folder_receive_it_at_once(
    file: ModelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = np.frombuffer(content(tmp_path), np.uint8)
    for offset in (0, 2 << 20):
        for machine in ("beta", "gamma"):
            monkeypatch.setattr(model_files.platform, "node", lambda name=machine: name)
            model_files.receive(file, offset, data[offset : offset + (2 << 20)])
    assert Path(model_files.find(file).path).read_bytes() == content(tmp_path)
    assert len(os.listdir(tmp_path / "cache")) == 1


def test_what_has_changed_on_the_way_is_not_kept(file: ModelFile, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.safetensors has changed while it was sent"):
        model_files.receive(file, 0, np.zeros(file.size, np.uint8))
    assert model_files.find(file).path == ""


def test_an_empty_file_is_described(tmp_path: Path) -> None:
    path = put(tmp_path / "empty", b"")
    assert model_files.describe(path).size == 0


def test_other_versions_are_refused() -> None:
    other_machine.check_versions(other_machine.versions())
    with pytest.raises(ValueError, match=r"ComfyUI [\d.]+ and not 0\.1, which the machine of ComfyUI has: install"):
        other_machine.check_versions({**other_machine.versions(), "ComfyUI": "0.1"})
