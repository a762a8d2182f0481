"""Build a model that `driver.export` has written from ComfyUI's memory to a file.

The file has eight bytes with the length of a JSON header, the header, and the tensors' bytes, each aligned. It is
memory-mapped, as that of any other model.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.model_base import BaseModel
from torch import Tensor

from raylight.sharding.assign import set_parameter, set_tensor

from .checkpoint import MappedModel, build_from_loader
from .gguf import GgmlTensors, GgufPack, map_ggml, open_pack
from .recipe import ModelRecipe

ALIGNMENT = 64
LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor is in the file; `offset` counts from the first tensor.

    `dtype` and `shape` are as stored, `model_dtype` is the dtype that the model needs, if another. For a quantised
    tensor of a GGUF pack, `ggml` is the number of its format, and `weight_shape` the shape of the weight.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    model_dtype: str | None = None
    ggml: int | None = None
    weight_shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Blueprint:
    """How ComfyUI builds the model: the class and attributes of its configuration.

    `model` and `diffusion_model` are the classes that must result; `ggml_kind` is the enum of quantisation formats.
    """

    config: type
    attributes: dict[str, Any]
    model: type
    diffusion_model: type
    model_type: Any
    ggml_kind: type | None = None


def header_of(weights: dict[str, Entry], around: dict[str, Entry]) -> bytes:
    """Return the start of a file with these tensors by name, of the diffusion model and of the model `around` it."""
    entries = {"diffusion_model": weights, "around": around}
    fields = {
        kind: {name: [getattr(one, field) for field in Entry.__slots__] for name, one in of_kind.items()}
        for kind, of_kind in entries.items()
    }
    content = json.dumps(fields).encode()
    content += b" " * (-(LENGTH_BYTES + len(content)) % ALIGNMENT)
    return len(content).to_bytes(LENGTH_BYTES, "little") + content


def load_exported(recipe: ModelRecipe) -> MappedModel:
    """Build the model of an exported recipe; its weights stay in the file.

    Raises ValueError: when ComfyUI builds another model, or the tensors do not fit it.
    """
    assert recipe.export is not None
    blueprint: Blueprint = pickle.loads(recipe.export.blueprint)
    content = torch.from_file(recipe.path, shared=False, size=recipe.size, dtype=torch.uint8)
    start = LENGTH_BYTES + int.from_bytes(bytes(content[:LENGTH_BYTES].tolist()), "little")
    header = json.loads(content[LENGTH_BYTES:start].numpy().tobytes())
    entries, around = (
        {name: Entry(*fields) for name, fields in header[kind].items()} for kind in ("diffusion_model", "around")
    )
    pack = open_pack(recipe.gguf_pack) if recipe.gguf_pack else None

    def read(entry: Entry) -> Tensor:
        value = content[start + entry.offset : start + entry.offset + entry.nbytes]
        value = value.view(getattr(torch, entry.dtype)).view(entry.shape)
        return value if entry.ggml is None else _ggml(pack, blueprint, entry, value)

    tensors = {name: read(entry) for name, entry in entries.items()}
    load = _loader(blueprint, tensors, {name: read(entry) for name, entry in around.items()})
    mapped = build_from_loader(load, {}) if pack is None else map_ggml(pack, GgmlTensors(pack), tensors, load)
    dtypes = {name: getattr(torch, entry.model_dtype) for name, entry in entries.items() if entry.model_dtype}
    return replace(mapped, dtypes=dtypes)


def _ggml(pack: GgufPack | None, blueprint: Blueprint, entry: Entry, value: Tensor) -> Tensor:
    assert pack is not None and blueprint.ggml_kind is not None
    return pack.tensor(
        value, tensor_type=blueprint.ggml_kind(entry.ggml), tensor_shape=torch.Size(entry.weight_shape), patches=[]
    )


def _loader(blueprint: Blueprint, tensors: dict[str, Tensor], around: dict[str, Tensor]) -> Callable[..., Any]:
    def load(options: dict[str, Any]) -> Any:
        config: Any = object.__new__(blueprint.config)
        vars(config).update(copy.deepcopy(blueprint.attributes))
        if "custom_operations" in options:
            config.custom_operations = options["custom_operations"]
        # ComfyUI detects it by names in a checkpoint, and the model has other names.
        config.model_type = lambda *_, **__: blueprint.model_type
        base = config.get_model({**tensors, **around}, "")
        del config.model_type
        for wanted, got in ((blueprint.model, base), (blueprint.diffusion_model, base.diffusion_model)):
            if type(got) is not wanted:
                raise ValueError(f"ComfyUI makes a {type(got).__name__} of the configuration of a {wanted.__name__}")
        patcher = comfy.model_patcher.CoreModelPatcher(
            base, load_device=comfy.model_management.get_torch_device(), offload_device=options["offload_device"]
        )
        _assign(base, tensors, around)
        return patcher

    return load


def _assign(base: BaseModel, tensors: dict[str, Tensor], around: dict[str, Tensor]) -> None:
    diffusion_model = base.diffusion_model
    keys = diffusion_model.load_state_dict(dict(tensors), strict=False, assign=True)
    for name in (*keys.missing_keys, *keys.unexpected_keys):
        raise ValueError(
            f"the tensor {name} is missing, or has no place in a {type(diffusion_model).__name__} as "
            f"ComfyUI builds it: a node has put another part into the model, or taken one out"
        )
    for name, parameter in list(diffusion_model.named_parameters()):
        # Some layers convert what they load; these have been converted already.
        if name in tensors and type(parameter) is torch.nn.Parameter and parameter.dtype != tensors[name].dtype:
            set_parameter(diffusion_model, name, tensors[name])
    for name, value in around.items():
        owner, _, leaf = name.rpartition(".")
        is_buffer = leaf in base.get_submodule(owner)._buffers
        (set_tensor if is_buffer else set_parameter)(base, name, value)
