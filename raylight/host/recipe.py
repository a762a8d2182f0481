"""Recipes: what another process needs to build the same model."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import NamedTuple

from raylight.cluster.config import SessionConfig
from raylight.parallel.external_strategies import OURS
from raylight.parallel.graphs import AUTO

# Where weights live: in full on each rank's device, or a shard of each on the device or in host memory.
REPLICATED, SHARDED, OFFLOADED = "replicated", "sharded", "offloaded"
GGUF = ".gguf"
WEIGHT_DTYPES = ("default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2", "bf16", "fp16")


class FileStamp(NamedTuple):
    """What distinguishes a file from its replacement under the same name: its size (bytes), the times of its last
    change of content and of status (ns), and its inode.

    `rsync --inplace -t` and the like set the first time back, and no program the second. A stamp is of the machine that
    made it; another machine only compares stamps with each other.
    """

    size: int
    modified_ns: int = 0
    changed_ns: int = 0
    inode: int = 0


def stamp(path: str) -> FileStamp:
    """Return the stamp of a file as it is now. Raises FileNotFoundError."""
    status = os.stat(path)
    return FileStamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@dataclass(frozen=True, slots=True)
class LoraRecipe:
    """A LoRA file (of any kind that ComfyUI knows) and its strength."""

    path: str
    strength: float
    stamp: FileStamp

    @classmethod
    def of(cls, path: str, strength: float) -> LoraRecipe:
        """Return the recipe of a file as it is now. Raises FileNotFoundError."""
        return cls(os.path.abspath(path), strength, stamp(path))

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


@dataclass(frozen=True, slots=True)
class Export:
    """A model that was written from the memory of ComfyUI's process: its name for users, and a pickled
    `exported.Blueprint`.
    """

    name: str
    blueprint: bytes


@dataclass(frozen=True, slots=True)
class ModelRecipe:
    """A diffusion model file, how to load it, and its LoRAs in their order. Equal recipes give the same weights.

    `sharding` is REPLICATED, SHARDED or OFFLOADED. `gguf_pack` is the folder of the ComfyUI-GGUF that reads a GGUF
    file, or whose layers an exported model has, and empty for any other. With `export` the file is one that Raylight
    wrote, in memory of this machine.
    """

    path: str
    weight_dtype: str
    stamp: FileStamp
    sharding: str = REPLICATED
    loras: tuple[LoraRecipe, ...] = ()
    gguf_pack: str = ""
    export: Export | None = None

    @classmethod
    def of(
        cls,
        path: str,
        weight_dtype: str,
        sharding: str = REPLICATED,
        loras: tuple[LoraRecipe, ...] = (),
        gguf_pack: str = "",
    ) -> ModelRecipe:
        """Return the recipe of a file as it is now. `gguf_pack` is the folder of ComfyUI-GGUF, if this ComfyUI has it.

        Raises FileNotFoundError. Raises ValueError: for a dtype that is unknown or that the file cannot have, and for a
        GGUF file without the pack.
        """
        if weight_dtype not in WEIGHT_DTYPES:
            raise ValueError(f"weight_dtype = {weight_dtype} is unknown: choose one of {', '.join(WEIGHT_DTYPES)}")
        if is_gguf(path):
            if weight_dtype != "default":
                raise ValueError(
                    f"weight_dtype = {weight_dtype} is not for {os.path.basename(path)}: weights of a "
                    f"GGUF file stay quantised as they are there. Choose default"
                )
            if not gguf_pack:
                raise ValueError(needs_pack(path))
        pack = gguf_pack if is_gguf(path) else ""
        return cls(os.path.abspath(path), weight_dtype, stamp(path), sharding, loras, pack)

    @property
    def name(self) -> str:
        return os.path.basename(self.path) if self.export is None else self.export.name

    @property
    def kind(self) -> str:
        """What the file holds, for messages."""
        return "a diffusion model"

    @property
    def is_there(self) -> bool:
        """Whether the file is still there and has not changed."""
        try:
            return stamp(self.path) == self.stamp
        except OSError:
            return False

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.stamp.size

    @property
    def without_loras(self) -> ModelRecipe:
        """The recipe of the same weights before any LoRA."""
        return replace(self, loras=())


def is_gguf(path: str) -> bool:
    """Return whether a path is one of a GGUF file, by its extension."""
    return path.lower().endswith(GGUF)


def needs_pack(path: str) -> str:
    """Return the error message for a GGUF file without ComfyUI-GGUF."""
    return (
        f"{os.path.basename(path)} is a GGUF file, which needs the custom node ComfyUI-GGUF; this ComfyUI does not "
        f"have it, or could not start it (see its log). Install it by ComfyUI-Manager or from "
        f"https://github.com/city96/ComfyUI-GGUF and restart ComfyUI, or choose the model as .safetensors"
    )


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """The workers that a graph asks for. `attention` names their attention kernel and `strategy` the sequence-parallel
    strategy around it. With `free_memory_after` they move the model out of GPU memory after each run. `sharding` is
    REPLICATED, SHARDED or OFFLOADED. `graphs` says whether forwards are replayed as CUDA graphs, by one of
    `parallel.graphs.NAMES`.
    """

    config: SessionConfig
    attention: str
    free_memory_after: bool = False
    strategy: str = OURS
    sharding: str = REPLICATED
    graphs: str = AUTO


@dataclass(frozen=True, slots=True)
class RayModel:
    """A model and the workers that run it."""

    workers: WorkerConfig
    recipe: ModelRecipe
