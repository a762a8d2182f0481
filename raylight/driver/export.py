"""Export of a model's weights from ComfyUI's process to a file in memory that all workers of this machine can map.

The last resort, for models of which no file is known or whose weights are no longer those of their file. The weights
are written once, in their own dtype.
"""

from __future__ import annotations

import inspect
import logging
import os
import pickle
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from raylight.host import pickling
from raylight.host.exported import ALIGNMENT, Blueprint, Entry, header_of
from raylight.host.foreign_code import node_name_of
from raylight.host.gguf import open_pack
from raylight.host.log_messages import gb
from raylight.host.recipe import Export, ModelRecipe
from raylight.sharding.alignment import aligned

from . import stock_weights
from .memory_file import MemoryFile
from .tensors_in_memory import write_tensors

logger = logging.getLogger(__name__)

REMEDY = "use Load Diffusion Model as MODEL (Ray), with which the workers read a file, or a loader of ComfyUI"
# Built again from the configuration.
_REBUILT = ("diffusion_model.", "model_sampling.")
_LARGEST_BLUEPRINT = 1 << 20


@dataclass(frozen=True, slots=True)
class _Item:
    """A tensor to write, of a plain class, and the fields of its `Entry`."""

    value: Tensor
    model_dtype: str | None = None
    ggml: int | None = None
    weight_shape: tuple[int, ...] = ()


def export(model: ModelPatcher) -> tuple[ModelRecipe, MemoryFile]:
    """Write the weights of a model without patches, and how to build it. Its recipe is valid as long as the file is
    open.

    Raises ValueError for a model that workers cannot build, or if there is no room; ComfyUI's interrupt if the user
    cancels.
    """
    with stock_weights.unpatched(model) as base:
        folder = gguf_folder(base)
        _check_classes(base, folder)
        blueprint = _blueprint(base, folder)
        weights, around = _weights(base, model.is_dynamic()), _around(base)
        return _write(type(base).__name__, blueprint, weights, around, folder)


def gguf_folder(base: BaseModel) -> str:
    """Return the folder of the GGUF pack whose tensors a model has, "" if none. Raises ValueError for a pack that
    workers cannot use.
    """
    value = _ggml_weight(base)
    if value is None:
        return ""
    folder = os.path.dirname(os.path.abspath(inspect.getfile(type(value))))
    try:
        open_pack(folder)
    except ValueError as error:
        raise ValueError(
            f"the weights of the {type(base).__name__} model are tensors of a pack in {folder}, which workers cannot "
            f"use as they use ComfyUI-GGUF: {error}. Load it with ComfyUI-GGUF, or as .safetensors"
        ) from error
    return folder


def _ggml_weight(base: BaseModel) -> Any:
    return next((value for value in stock_weights.weights(base).values() if stock_weights.is_ggml(value)), None)


def _check_classes(base: BaseModel, gguf_folder: str) -> None:
    """Raise ValueError, naming it, for a class that workers do not have."""
    for kind in map(type, (base.model_config, *base.modules())):
        path = getattr(sys.modules.get(kind.__module__), "__file__", None)
        of_pack = gguf_folder and path is not None and os.path.dirname(os.path.abspath(path)) == gguf_folder
        if not of_pack and pickling.is_of_a_pack(kind):
            raise ValueError(
                f"the {type(base).__name__} model has a module of the class {kind.__name__} "
                f"({node_name_of(kind)}), which only its pack can build, and not workers: {REMEDY}"
            )


def _blueprint(base: BaseModel, gguf_folder: str) -> bytes:
    config = base.model_config
    attributes = {
        name: value for name, value in vars(config).items() if not (gguf_folder and name == "custom_operations")
    }
    value = _ggml_weight(base)
    kind = None if value is None else type(value.tensor_type)
    blueprint = Blueprint(type(config), attributes, type(base), type(base.diffusion_model), base.model_type, kind)
    try:
        content = pickle.dumps(blueprint)
    except Exception as error:  # any, as the attributes are whatever a loader has set
        raise ValueError(
            f"the configuration of the {type(base).__name__} model cannot be sent to workers: {error}: {REMEDY}"
        ) from error
    if len(content) > _LARGEST_BLUEPRINT:
        raise ValueError(
            f"the configuration of the {type(base).__name__} model takes {len(content) / 1e6:.1f} MB, so it "
            f"contains more than a configuration: {REMEDY}"
        )
    return content


def _weights(base: BaseModel, is_dynamic: bool) -> dict[str, _Item]:
    """Return what a state dict of the diffusion model holds, as plain tensors."""
    found: dict[str, _Item] = {}
    for path, module in base.diffusion_model.named_modules():
        prefix = f"{path}." if path else ""
        if any(value is not None and is_traceable_wrapper_subclass(value) for value in module._parameters.values()):
            # Layers with quantised weights save them as files have them.
            found |= {name: _Item(value) for name, value in module.state_dict(prefix=prefix).items()}
            continue
        for leaf, value in stock_weights.weights_of(module).items():
            if stock_weights.is_ggml(value):
                found[prefix + leaf] = _ggml(value)
            else:
                found[prefix + leaf] = _Item(value, _other_dtype(module, leaf, value) if is_dynamic else None)
    return found


def _ggml(value: Any) -> _Item:
    stored = stock_weights.plain_tensors(value)[""]
    return _Item(stored, ggml=int(value.tensor_type), weight_shape=tuple(value.tensor_shape))


def _other_dtype(module: nn.Module, leaf: str, value: Tensor) -> str | None:
    """Return the dtype that ComfyUI's dynamic VRAM gives a weight when it is used, if not its dtype in the file."""
    dtype = getattr(module, f"{leaf}_comfy_model_dtype", None)
    return None if dtype is None or dtype == value.dtype else _name(dtype)


def _around(base: BaseModel) -> dict[str, _Item]:
    """Return weights of the model around the diffusion model: embeddings of numbers, statistics."""
    return {
        name: _Item(value)
        for path, module in base.named_modules()
        for leaf, value in stock_weights.weights_of(module).items()
        if not (name := f"{path}.{leaf}" if path else leaf).startswith(_REBUILT)
    }


def _write(
    model: str, blueprint: bytes, weights: dict[str, _Item], around: dict[str, _Item], gguf_folder: str
) -> tuple[ModelRecipe, MemoryFile]:
    entries: list[Entry] = []
    end = 0
    for name, item in (*weights.items(), *around.items()):
        value = item.value
        if value.is_meta:
            raise ValueError(f"the weight {name} of the {model} model has no content: {REMEDY}")
        if is_traceable_wrapper_subclass(value):
            raise ValueError(
                f"the weight {name} of the {model} model is a {type(value).__name__}, which Raylight does not know: "
                f"{REMEDY}"
            )
        entries.append(
            Entry(
                _name(value.dtype),
                tuple(value.shape),
                end,
                value.nbytes,
                item.model_dtype,
                item.ggml,
                item.weight_shape,
            )
        )
        end += aligned(value.nbytes, ALIGNMENT)
    count = len(weights)
    header = header_of(
        dict(zip(weights, entries[:count], strict=True)), dict(zip(around, entries[count:], strict=True))
    )
    values = [item.value for item in (*weights.values(), *around.values())]
    placed = ((entry.offset, value) for entry, value in zip(entries, values, strict=True))
    file = write_tensors(f"{model} model", header, placed, end)
    logger.info(
        "the workers get the weights of the %s model from ComfyUI's memory, as they are in no file: this takes %s once "
        "for all of them, in %s",
        model,
        gb(file.nbytes),
        file.where,
    )
    made = Export(f"{model} (from memory)", blueprint)
    return replace(ModelRecipe.of(file.path, "default"), gguf_pack=gguf_folder, export=made), file


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
