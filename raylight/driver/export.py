"""Weights of ComfyUI's process put where all workers of this machine can map them: once, in their own dtype.

This is the last resort, for models of which no file is known or whose weights are no longer those of their file.
"""

from __future__ import annotations

import inspect
import logging
import os
import pickle
import sys
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from raylight.host import pickling
from raylight.host.exported import ALIGNMENT, Blueprint, Entry, header_of
from raylight.host.foreign_code import node_name_of
from raylight.host.gguf import open_pack
from raylight.host.recipe import Export, ModelRecipe

from . import stock_weights
from .memory_file import MemoryFile

logger = logging.getLogger(__name__)

REMEDY = "use Load Diffusion Model as MODEL (Ray), which has the workers read a file, or a loader of ComfyUI"
# Made anew of the configuration.
_REBUILT = ("diffusion_model.", "model_sampling.")
_LARGEST_BLUEPRINT = 1 << 20


@dataclass(frozen=True, slots=True)
class _Item:
    """A tensor to be written: plain, with what its entry says beside its place."""

    value: Tensor
    model_dtype: str | None = None
    ggml: int | None = None
    weight_shape: tuple[int, ...] = ()


def export(model: ModelPatcher) -> tuple[ModelRecipe, MemoryFile]:
    """Write the weights of a model, without patches, and how it is built. Its recipe holds for as long as the file is
    open.

    Raises ValueError for a model that workers could not build again, or where there is no room; ComfyUI's interrupt
    when the person cancels.
    """
    with stock_weights.unpatched(model) as base:
        folder = gguf_folder(base)
        _check_classes(base, folder)
        blueprint = _blueprint(base, folder)
        weights, around = _weights(base, model.is_dynamic()), _around(base)
        recipe, file = _write(type(base).__name__, blueprint, weights, around, folder)
    return recipe, file


def gguf_folder(base: BaseModel) -> str:
    """The folder of the GGUF pack whose tensors a model has, and empty for any other. Raises ValueError for a pack that
    workers cannot use."""
    kind = next((type(value) for value in stock_weights.weights(base).values() if stock_weights.is_ggml(value)), None)
    if kind is None:
        return ""
    folder = os.path.dirname(os.path.abspath(inspect.getfile(kind)))
    try:
        open_pack(folder)
    except ValueError as error:
        raise ValueError(
            f"the weights of the {type(base).__name__} model are tensors of a pack in {folder}, which "
            f"workers cannot use as they use ComfyUI-GGUF: {error}. Load it by ComfyUI-GGUF, or as "
            f".safetensors"
        ) from error
    return folder


def _check_classes(base: BaseModel, gguf_folder: str) -> None:
    """Raises ValueError, naming it, for a class that workers would not have."""
    for part in (base.model_config, *base.modules()):
        kind = type(part)
        path = getattr(sys.modules.get(kind.__module__), "__file__", None)
        of_pack = gguf_folder and path is not None and os.path.dirname(os.path.abspath(path)) == gguf_folder
        if not of_pack and pickling.is_of_a_pack(kind):
            raise ValueError(
                f"the {type(base).__name__} model has a part of the class {kind.__name__} "
                f"({node_name_of(kind)}), which workers cannot build, as only its pack can: {REMEDY}"
            )


def _blueprint(base: BaseModel, gguf_folder: str) -> bytes:
    config = base.model_config
    attributes = {
        name: value for name, value in vars(config).items() if not (gguf_folder and name == "custom_operations")
    }
    kind = next(
        (type(value.tensor_type) for value in stock_weights.weights(base).values() if stock_weights.is_ggml(value)),
        None,
    )
    try:
        content = pickle.dumps(
            Blueprint(type(config), attributes, type(base), type(base.diffusion_model), base.model_type, kind)
        )
    except Exception as error:  # of whatever a loader has put there
        raise ValueError(
            f"the configuration of the {type(base).__name__} model cannot be sent to workers: {error}: {REMEDY}"
        ) from error
    if len(content) > _LARGEST_BLUEPRINT:
        raise ValueError(
            f"the configuration of the {type(base).__name__} model takes {len(content) / 1e6:.1f} MB, and "
            f"so holds more than that: {REMEDY}"
        )
    return content


def _weights(base: BaseModel, is_dynamic: bool) -> dict[str, _Item]:
    """What a state dict of the diffusion model holds, as tensors that are plain."""
    found: dict[str, _Item] = {}
    for path, module in base.diffusion_model.named_modules():
        prefix = f"{path}." if path else ""
        if any(value is not None and is_traceable_wrapper_subclass(value) for value in module._parameters.values()):
            # Layers with quantised weights know how files have them.
            found |= {name: _Item(value) for name, value in module.state_dict(prefix=prefix).items()}
            continue
        for leaf, value in _own(module).items():
            if stock_weights.is_ggml(value):
                found[prefix + leaf] = _ggml(value)
            else:
                found[prefix + leaf] = _Item(value, _other_dtype(module, leaf, value) if is_dynamic else None)
    return found


def _own(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module itself that files have."""
    return {
        leaf: value
        for leaf, value in (*module._parameters.items(), *module._buffers.items())
        if value is not None and leaf not in module._non_persistent_buffers_set
    }


def _ggml(value: Tensor) -> _Item:
    stored = stock_weights.parts(value)[""]
    return _Item(stored, ggml=int(value.tensor_type), weight_shape=tuple(value.tensor_shape))


def _other_dtype(module: nn.Module, leaf: str, value: Tensor) -> str | None:
    """With ComfyUI's dynamic VRAM weights stay as files have them, and get the model's dtype when they are used."""
    dtype = getattr(module, f"{leaf}_comfy_model_dtype", None)
    return None if dtype is None or dtype == value.dtype else _name(dtype)


def _around(base: BaseModel) -> dict[str, _Item]:
    """Weights of the model that are not the diffusion model's: embeddings of numbers, statistics."""
    return {
        name: _Item(value)
        for path, module in base.named_modules()
        for leaf, value in _own(module).items()
        if not (name := f"{path}.{leaf}" if path else leaf).startswith(_REBUILT)
    }


def _write(
    model: str, blueprint: bytes, weights: dict[str, _Item], around: dict[str, _Item], gguf_folder: str
) -> tuple[ModelRecipe, MemoryFile]:
    items = [*weights.items(), *around.items()]
    for name, item in items:
        if item.value.is_meta:
            raise ValueError(f"the weight {name} of the {model} model has no content: {REMEDY}")
        if is_traceable_wrapper_subclass(item.value):
            raise ValueError(
                f"the weight {name} of the {model} model is a {type(item.value).__name__}, which Raylight "
                f"does not know: {REMEDY}"
            )
    offsets, end = [], 0
    for _, item in items:
        offsets.append(end)
        end += -(-_nbytes(item.value) // ALIGNMENT) * ALIGNMENT
    entries = [
        Entry(
            _name(item.value.dtype),
            tuple(item.value.shape),
            offset,
            _nbytes(item.value),
            item.model_dtype,
            item.ggml,
            item.weight_shape,
        )
        for (_, item), offset in zip(items, offsets, strict=True)
    ]
    header = header_of(
        dict(zip(weights, entries[: len(weights)], strict=True)),
        dict(zip(around, entries[len(weights) :], strict=True)),
    )
    file = MemoryFile(f"raylight {model}", len(header) + end)
    try:
        file.write(header, 0)
        for (_, item), offset in zip(items, offsets, strict=True):
            comfy.model_management.throw_exception_if_processing_interrupted()
            file.write(_bytes(item.value), len(header) + offset)
        status = file.finish()
    except OSError as error:
        file.close()
        raise ValueError(f"the weights of the {model} model cannot be written to {file.where}: {error}") from error
    except BaseException:
        file.close()
        raise
    logger.info(
        "the workers get the weights of the %s model from ComfyUI's memory, as they are in no file: this takes "
        "%.2f GB once for all of them, in %s",
        model,
        status.st_size / 1e9,
        file.where,
    )
    made = Export(f"{model} (from memory)", blueprint, status.st_ino)
    return replace(ModelRecipe.of(file.path, "default"), gguf_pack=gguf_folder, export=made), file


def _bytes(value: Tensor) -> Any:
    content = value.detach().cpu().contiguous().reshape(-1)
    return memoryview(content.view(torch.uint8).numpy()) if content.numel() else b""


def _nbytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
