"""Loading a diffusion model in a worker, through ComfyUI's own loader."""

from __future__ import annotations

import logging
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError

from raylight.cluster.errors import is_out_of_memory

from .checkpoint import MappedModel, load_mapped
from .exported import load_exported
from .gguf import load_gguf
from .notices import is_rank, some
from .recipe import WEIGHT_DTYPES, ModelRecipe
from .tensor_file import in_words

logger = logging.getLogger(__name__)

# What readers and ComfyUI's detection raise for files that are something else: they look for tensors by name, and take
# what they find for tensors.
_OF_FILES = (
    RuntimeError,
    ValueError,
    OSError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    zipfile.BadZipFile,
    SafetensorError,
)


def map_file(recipe: ModelRecipe, tells: bool = True) -> MappedModel:
    """The model of a recipe with its weights still in the file.

    Raises ValueError, naming the file, when it cannot be a diffusion model. Logs, as ComfyUI does, what the model has
    no place for; in ComfyUI's process only, which maps each file too, and not where it only looks (`tells`)."""
    with file_errors(recipe):
        if recipe.export is not None:
            return load_exported(recipe)
        if recipe.gguf_pack:
            mapped = load_gguf(recipe.path, recipe.gguf_pack)
        else:
            mapped = load_mapped(recipe.path, _options(recipe.weight_dtype))
    if mapped.unused and tells and not is_rank():
        logger.warning(
            "%s is loaded without %d of its tensors, for which %s has no place (unet unexpected: %s)",
            recipe.name,
            len(mapped.unused),
            type(mapped.model.diffusion_model).__name__,
            some(mapped.unused),
        )
    return mapped


@contextmanager
def file_errors(recipe: ModelRecipe) -> Iterator[None]:
    """Within it, what is wrong with the file is a ValueError that names it."""
    if recipe.export is not None and not recipe.is_there:
        raise ValueError(
            f"the weights of {recipe.name} that workers had in memory have gone with the model that they "
            f"were of, or others have taken their place: run the prompt again from its loader"
        )
    if not os.path.isfile(recipe.path):
        raise ValueError(f"the model file {recipe.path} is not there on the machine of this worker")
    try:
        yield
    except pickle.UnpicklingError as error:
        # PyTorch's own message tells how to run what such a file holds.
        raise ValueError(
            f"{recipe.name} cannot be loaded as a diffusion model: it is damaged, or holds more than "
            f"tensors, which may be a program and is not run. Take it as .safetensors"
        ) from error
    except _OF_FILES as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{recipe.name} cannot be loaded as a diffusion model: {in_words(error)}") from error


def weight_dtype_of(options: dict[str, Any]) -> str | None:
    """The weight dtype of which ComfyUI's loaders make these model options; None where no choice of theirs does."""
    return next((name for name in WEIGHT_DTYPES if _options(name) == options), None)


def _options(weight_dtype: str) -> dict[str, Any]:
    """The model options that ComfyUI's own UNETLoader makes of a weight dtype, and the two it lacks."""
    dtypes = {
        "default": {},
        "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
        "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
        "fp8_e5m2": {"dtype": torch.float8_e5m2},
        "bf16": {"dtype": torch.bfloat16},
        "fp16": {"dtype": torch.float16},
    }
    return dict(dtypes[weight_dtype])
