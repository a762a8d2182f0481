"""Messages between ComfyUI's process and the workers about a VAE: its recipe, what to do, and the result."""

from __future__ import annotations

import os
from dataclasses import dataclass

from raylight.cluster.serialization import SerializedObject

from .jobs import RandomState
from .recipe import Export, ModelRecipe, stamp


@dataclass(frozen=True, slots=True)
class VaeRecipe(ModelRecipe):
    """A VAE, in a file of its own or exported from the memory of ComfyUI's process; every rank holds all of it.

    `weight_dtype` is the name of the torch dtype that it computes in, "" for what ComfyUI chooses on the worker's
    device.
    """

    @classmethod
    def of_file(cls, path: str, dtype: str, export: Export | None = None) -> VaeRecipe:
        """Return the recipe of a file as it is now. Raises FileNotFoundError."""
        return cls(os.path.abspath(path), dtype, stamp(path), export=export)

    @property
    def kind(self) -> str:
        """What the file holds, for messages."""
        return "a VAE"


@dataclass(frozen=True, slots=True)
class VaeJob:
    """Decode a latent, (B, C, [T,] H, W), or encode a picture, (B, [T,] H, W, C), once.

    `content` is a serialized `(tensor, options)`, where options are further arguments of the VAE's method. The result
    is of at least `least_pieces` pieces of the width, and of more where memory is short. Ranks write a decoded picture
    to the file `picture` if there is one, which rank 0 gives its size (`shared_picture`); else they return their rows.
    """

    recipe: VaeRecipe
    content: SerializedObject
    random: RandomState
    picture: str = ""
    least_pieces: int = 1
    free_memory_after: bool = False


@dataclass(frozen=True, slots=True)
class VaeResult:
    """What a rank has of a result of `shape`, channels first, of the torch dtype `dtype`: `rows`, a serialized tensor,
    or None if they are in the picture's file. `pieces` of the width were computed one after the other.
    """

    shape: tuple[int, ...]
    dtype: str
    pieces: int
    random: RandomState
    rows: SerializedObject | None = None


@dataclass(frozen=True, slots=True)
class VaeProgress:
    """Rank 0 has computed `done` of `total` pieces: images of the batch, or parts of their width."""

    done: int
    total: int
