"""Build the model of a recipe, whatever its file is: a checkpoint, GGUF, or an export from ComfyUI's memory."""

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
from .gguf import load_gguf, pack_here
from .log_messages import first_few, is_worker
from .model_files import here
from .recipe import ModelRecipe
from .tensor_file import describe_error

logger = logging.getLogger(__name__)

# The model options that ComfyUI's UNETLoader makes of a weight dtype, and two that it lacks.
_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
}
# What readers and ComfyUI's detection raise for files of something else, as they look for tensors by name.
_READ_ERRORS = (
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


def map_file(recipe: ModelRecipe, log_unused: bool = True) -> MappedModel:
    """Build the model of a recipe without its LoRAs; its weights stay in the file.

    With `log_unused`, log which tensors of the file the model has no place for, as ComfyUI does. Workers do not log:
    ComfyUI's process maps each file too.

    Raises ValueError: when the file cannot be a diffusion model; the message names the file.
    """
    with file_errors(recipe):
        if recipe.export is not None:
            return load_exported(recipe)
        if recipe.gguf_pack:
            mapped = load_gguf(here(recipe.path), pack_here(recipe))
        else:
            mapped = load_mapped(here(recipe.path), _OPTIONS[recipe.weight_dtype])
    if mapped.unused and log_unused and not is_worker():
        logger.warning(
            "%s is loaded without %d of its tensors, for which %s has no place (unet unexpected: %s)",
            recipe.name,
            len(mapped.unused),
            type(mapped.model.diffusion_model).__name__,
            first_few(mapped.unused),
        )
    return mapped


@contextmanager
def file_errors(recipe: ModelRecipe) -> Iterator[None]:
    """Within it, turn errors of reading the recipe's file into a ValueError that names the file.

    Raises ValueError: when the file is gone or was replaced, or for what is raised within.
    """
    if recipe.export is not None and not recipe.is_there:
        raise ValueError(
            f"the weights of {recipe.name} that workers had in memory have gone with the model that they "
            f"were of, or others have taken their place: run the prompt again from its loader"
        )
    if not os.path.isfile(here(recipe.path)):
        raise ValueError(f"the model file {recipe.path} is not there on the machine of this worker")
    try:
        yield
    except pickle.UnpicklingError as error:
        # PyTorch's own message says how to run what such a file holds.
        raise ValueError(
            f"{recipe.name} cannot be loaded as {recipe.kind}: the file is damaged, or is a pickle with more than "
            f"tensors, which is not loaded for safety. Use a .safetensors file"
        ) from error
    except _READ_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{recipe.name} cannot be loaded as {recipe.kind}: {describe_error(error)}") from error


def weight_dtype_of(options: dict[str, Any]) -> str | None:
    """Return the weight dtype of which ComfyUI's loaders make these model options; None if there is none."""
    return next((name for name, made in _OPTIONS.items() if made == options), None)
