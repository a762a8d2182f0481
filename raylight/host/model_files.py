"""The same model file on several machines: which file ComfyUI's process means, and where a worker's machine has it.

A machine has it under the same name in one of ComfyUI's model folders, or at the same path, or in a cache into which it
was sent before. What is there is compared by size and by a digest of samples of its content, never by its name alone.
The same goes for the modules of ComfyUI-GGUF, but that code is never sent.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .recipe import ModelRecipe

CACHE_VARIABLE = "RAYLIGHT_CACHE"
_START_BYTES = 1 << 20  # has the header of nearly every file
_SAMPLES, _SAMPLE_BYTES = 64, 16 << 10
_DIGEST_LETTERS = 16  # of a digest in a file's name

# Where this process reads a file that ComfyUI's process has at a path, if not there.
_elsewhere: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file of ComfyUI's machine: its path, its `(kind of folder, name)` in ComfyUI's model folders, its size (bytes)
    and its `digest_of`.
    """

    path: str
    names: tuple[tuple[str, str], ...]
    size: int
    digest: str

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


@dataclass(frozen=True, slots=True)
class FoundFile:
    """What a machine has of a file: the path, "" if it has none of this content. `other` is the path of a file of that
    name with other content, of `other_size` bytes. `cache` is the folder for files that are sent there, with
    `free_bytes` on its disk.
    """

    machine: str
    path: str
    other: str
    other_size: int
    cache: str
    free_bytes: int


def digest_of(path: str) -> str:
    """Return a digest of a file's size, its first MiB, and blocks that are spread over the rest, in hexadecimal.

    Files that differ in a tensor differ in it, nearly always, and 30 GB take as long as 2 MB. Raises OSError.
    """
    size = os.path.getsize(path)
    found = hashlib.sha256(size.to_bytes(8, "little"))
    with open(path, "rb") as file:
        found.update(file.read(_START_BYTES))
        for index in range(_SAMPLES):
            file.seek(max(0, (size - _SAMPLE_BYTES) * index // (_SAMPLES - 1)))
            found.update(file.read(_SAMPLE_BYTES))
    return found.hexdigest()


def describe(path: str) -> ModelFile:
    """Return the description of a file of this machine, for others. Raises OSError."""
    import folder_paths  # this module must be importable before ComfyUI is set up

    names = [
        (kind, os.path.relpath(path, folder))
        for kind, (folders, _) in folder_paths.folder_names_and_paths.items()
        for folder in map(os.path.abspath, folders)
        if os.path.commonpath([folder, path]) == folder
    ]
    return ModelFile(path, tuple(dict.fromkeys(names)), os.path.getsize(path), digest_of(path))


def find(file: ModelFile) -> FoundFile:
    """Return what this machine has of a file, and read it from there from now on."""
    cached = _cached(file)
    other, other_size = "", 0
    for candidate in [*_candidates(file), cached]:
        try:
            size = os.path.getsize(candidate)
            is_same = size == file.size and digest_of(candidate) == file.digest
        except OSError:
            continue
        if is_same:
            _elsewhere[file.path] = candidate
            return FoundFile(platform.node(), candidate, "", 0, "", 0)
        other, other_size = other or candidate, other_size or size
    folder = Path(cached).parent
    there = next(one for one in (folder, *folder.parents) if one.exists())
    free = shutil.disk_usage(there).free
    return FoundFile(platform.node(), "", other, other_size, str(folder), free)


def receive(file: ModelFile, offset: int, data: np.ndarray) -> None:
    """Write a part of a file, (bytes,) uint8, into the cache; with the last part the file is complete.

    Raises OSError: when it cannot be written. Raises ValueError: when it is not what was sent.
    """
    path = _cached(file)
    part = f"{path}.{platform.node()}.part"  # machines may share the folder, and each is sent the file
    if offset == 0:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(part, "wb" if offset == 0 else "r+b") as out:
        out.seek(offset)
        out.write(data.data)
    if offset + len(data) == file.size:
        if digest_of(part) != file.digest:
            raise ValueError(f"{file.name} has changed while it was sent to {platform.node()}: run the prompt again")
        os.replace(part, path)


def here(path: str) -> str:
    """Return where this process reads the file that ComfyUI's process has at `path`."""
    return _elsewhere.get(path, path)


def paths_of(recipe: ModelRecipe) -> tuple[str, ...]:
    """Return the paths of the files that a recipe needs."""
    return recipe.path, *(lora.path for lora in recipe.loras)


def _candidates(file: ModelFile) -> list[str]:
    """Return where this machine may have a file: by its names in ComfyUI's folders, then at the same path."""
    import folder_paths

    found = [
        os.path.join(folder, name)
        for kind, name in file.names
        for folder in folder_paths.folder_names_and_paths.get(kind, ((), ()))[0]
    ]
    return [*dict.fromkeys([*found, file.path])]


def _cached(file: ModelFile) -> str:
    root = os.environ.get(CACHE_VARIABLE) or os.path.join(os.path.expanduser("~"), ".cache", "raylight")
    return os.path.join(root, f"{file.digest[:_DIGEST_LETTERS]}-{file.name}")
