"""GGUF files, by the ComfyUI-GGUF pack: found in ComfyUI's process; its reader and layers are imported in a worker.

The pack knows GGUF's formats. Workers load no custom nodes, so they import the modules that they need from the pack's
folder, without what registers its nodes.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import comfy.sd
import torch
from torch import Tensor, nn

from raylight.sharding.assign import set_parameter
from raylight.sharding.subclass_weights import Components, Flattened, flatten_tensor

from .checkpoint import MappedModel, build_from_loader
from .model_files import here
from .recipe import ModelRecipe

NODE = "UnetLoaderGGUF"
# Of each module, names and the fields of GgufPack.
_IMPORTED = {
    "loader": {"gguf_sd_loader": "reader"},
    "ops": {"GGMLTensor": "tensor", "GGMLLayer": "layer", "GGMLOps": "operations"},
    "dequant": {"is_quantized": "is_quantized", "dequantize_tensor": "dequantize"},
}


@dataclass(frozen=True, slots=True)
class GgufPack:
    """The names of the pack that workers use: `tensor` is its class of quantised tensors, `operations` its layers for
    ComfyUI's models, `layer` the base class of those that take quantised weights.
    """

    name: str
    folder: str
    reader: Callable[[str], Any]
    tensor: type
    layer: type
    operations: type
    is_quantized: Callable[[Any], bool]
    dequantize: Callable[..., Tensor]

    def read(self, path: str) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """Return the tensors of a file, memory-mapped, and its metadata if the pack returns it.

        Raises ValueError: for a file that the pack does not understand.
        """
        try:
            found = self.reader(path)
        except Exception as error:  # its reader walks through bytes, and fails in the ways of numpy and Python
            raise ValueError(f"ComfyUI-GGUF cannot read it: {type(error).__name__}: {error}") from error
        # Older versions return the tensors alone.
        tensors, extra = found if isinstance(found, tuple) else (found, {})
        return tensors, extra.get("metadata") if isinstance(extra, dict) else None


def find() -> str:
    """Return the folder of the pack that this ComfyUI has started with; empty if there is none."""
    # By its node, and not by its folder: users rename folders, and a pack can fail to start.
    nodes = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})
    if NODE not in nodes:
        return ""
    folder = os.path.dirname(os.path.abspath(inspect.getfile(nodes[NODE])))
    complete = all(os.path.isfile(os.path.join(folder, f"{module}.py")) for module in _IMPORTED)
    return folder if complete else ""


def code_of(recipe: ModelRecipe) -> tuple[str, ...]:
    """Return the paths of the code that reads the file of a recipe and is neither ComfyUI's nor Raylight's."""
    return tuple(os.path.join(recipe.gguf_pack, f"{module}.py") for module in _IMPORTED if recipe.gguf_pack)


def pack_here(recipe: ModelRecipe) -> str:
    """Return the folder from which this process imports the ComfyUI-GGUF of a recipe."""
    return os.path.dirname(here(code_of(recipe)[0]))


@functools.cache
def open_pack(folder: str) -> GgufPack:
    """Import the pack in this process.

    Raises ValueError: when it is not there, cannot be imported or lacks a name that Raylight needs.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"ComfyUI-GGUF is not in {folder} on the machine of this worker")
    name = f"raylight_gguf_{hashlib.sha256(folder.encode()).hexdigest()[:8]}"
    package = ModuleType(name)
    package.__path__ = [folder]  # a package whose __init__, which registers nodes, does not run
    sys.modules[name] = package
    found: dict[str, Any] = {}
    for module, names in _IMPORTED.items():
        try:
            imported = importlib.import_module(f"{name}.{module}")
        except Exception as error:  # of code that is not ours
            raise ValueError(f"{module}.py of ComfyUI-GGUF in {folder} cannot be imported: {error}") from error
        for one, field in names.items():
            if not hasattr(imported, one):
                raise ValueError(
                    f"{module}.py of ComfyUI-GGUF in {folder} has no {one}, which Raylight needs: update "
                    f"Raylight, or use the version of ComfyUI-GGUF that has it"
                )
            found[field] = getattr(imported, one)
    return GgufPack(name, folder, **found)


# What a layer adds to a weight when it dequantises it: ComfyUI's patches with the weight's name.
Patches = list[tuple[list[Any], str]]


class PatchedOnUse:
    """Rebuild a quantised weight from its bytes, with the patches that it has at that time."""

    def __init__(self, kind: type, tensor_type: Any, shape: Sequence[int]) -> None:
        self._kind, self._type, self._shape = kind, tensor_type, shape
        self.patches: Patches = []

    def __call__(self, components: Components) -> Tensor:
        """Return the pack's tensor of `raw`, (weight rows, bytes of a row) uint8."""
        raw = components["raw"]
        if raw.device.type == "cpu":
            # The pack uses numpy for rare formats, which would keep the buffer of gathered weights from being freed.
            raw = raw.clone()
        return self._kind(raw, tensor_type=self._type, tensor_shape=self._shape, patches=list(self.patches))


class GgmlTensors:
    """`QuantisedTensors` of a pack."""

    def __init__(self, pack: GgufPack) -> None:
        self._pack = pack

    def is_quantised(self, value: Tensor) -> bool:
        """Return whether it is a quantised tensor of the pack."""
        return self._pack.is_quantized(value)

    def with_patches(self, value: Any, patches: Patches) -> Tensor:
        """Return another tensor of the same bytes (moving one does not move the other) with these patches and no
        others; `value` itself if it is not quantised.
        """
        if not self.is_quantised(value):
            return value
        return self._pack.tensor(
            plain(value), tensor_type=value.tensor_type, tensor_shape=value.tensor_shape, patches=patches
        )

    def flatten(self, parameter: Any) -> Flattened | None:
        """Return the bytes of a quantised tensor, (weight rows, bytes of a row) uint8; else as `flatten_tensor`."""
        if not self.is_quantised(parameter):
            return flatten_tensor(parameter)
        return Flattened(
            {"raw": plain(parameter)}, PatchedOnUse(self._pack.tensor, parameter.tensor_type, parameter.tensor_shape)
        )


def plain(value: Tensor) -> Tensor:
    """Return the storage of a tensor, uint8 if it is quantised, as PyTorch's own class."""
    with torch._C.DisableTorchFunctionSubclass():  # which would make it one of the pack's again
        return value.as_subclass(Tensor)


def load_gguf(path: str, folder: str) -> MappedModel:
    """Detect and build the model of a GGUF file by the ComfyUI-GGUF in `folder`; its weights stay in the file.

    Raises ValueError: for a file that the pack or ComfyUI does not know, for a tensor that is missing or of another
    shape (the message names it), and for a pack that is not there or works in another way.
    """
    pack = open_pack(folder)
    tensors, metadata = pack.read(path)
    ggml = GgmlTensors(pack)
    tensors = {name: value if ggml.is_quantised(value) else plain(value) for name, value in tensors.items()}

    def load(options: dict[str, Any]) -> Any:
        patcher = comfy.sd.load_diffusion_model_state_dict(tensors, model_options=options, metadata=metadata)
        if patcher is None:
            raise ValueError("ComfyUI knows no diffusion model with such tensors")
        return patcher

    return map_ggml(pack, ggml, tensors, load)


def map_ggml(
    pack: GgufPack, ggml: GgmlTensors, tensors: dict[str, Tensor], load: Callable[[dict[str, Any]], Any]
) -> MappedModel:
    """Build the model that `load` makes of these tensors with ComfyUI's options for it. Raises as `load_gguf`."""
    _check_patches(pack, ggml, tensors)
    mapped = build_from_loader(load, {"custom_operations": _operations(pack)()})
    _dequantise_outside_of_layers(mapped, pack)
    return replace(mapped, ggml=ggml)


@functools.cache
def _operations(pack: GgufPack) -> type:
    """Return the pack's layers, with linear ones that check their tensors: the pack's take any tensor, or none."""

    class Linear(pack.operations.Linear):
        def __init__(
            self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
        ) -> None:
            super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
            self._shapes = {"weight": (out_features, in_features)} | ({"bias": (out_features,)} if bias else {})

        def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
            for leaf, shape in self._shapes.items():
                value = state_dict.get(prefix + leaf)
                if value is None:
                    raise ValueError(f"the tensor {prefix}{leaf} is missing")
                if tuple(value.shape) != shape:
                    raise ValueError(f"the tensor {prefix}{leaf} is {tuple(value.shape)}, and the model wants {shape}")
            super()._load_from_state_dict(state_dict, prefix, *rest)

    return type("Operations", (pack.operations,), {"Linear": Linear})


def _dequantise_outside_of_layers(mapped: MappedModel, pack: GgufPack) -> None:
    """Dequantise the parameters that other modules than the pack's layers use; they are small."""
    diffusion_model = mapped.model.diffusion_model
    for path, module in list(diffusion_model.named_modules()):
        if isinstance(module, pack.layer):
            continue
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if pack.is_quantized(parameter):
                name = f"{path}.{leaf}" if path else leaf
                value = pack.dequantize(parameter, mapped.dtypes.get(name, torch.float32))
                set_parameter(diffusion_model, name, plain(value))


def _check_patches(pack: GgufPack, ggml: GgmlTensors, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError if a layer of the pack does not apply a patch to one row of a weight: a version that takes
    patches in another way would silently leave LoRAs out.
    """
    weight: Any = next(
        (
            value
            for value in tensors.values()
            if ggml.is_quantised(value)
            and value.ndim == 2
            and plain(value).ndim == 2
            and plain(value).shape[0] == value.shape[0]
        ),
        None,
    )
    if weight is None:
        return
    width = weight.shape[1]
    patch = [(1.0, ("diff", (torch.ones(1, width),)), 1.0, None, None)]
    try:
        row = pack.tensor(plain(weight)[:1], tensor_type=weight.tensor_type, tensor_shape=torch.Size((1, width)))
        layer = pack.operations.Linear(width, 1, bias=False)
        results = []
        for patches in ([], [(patch, "trial")]):
            layer.weight = nn.Parameter(ggml.with_patches(row, patches), requires_grad=False)
            results.append(layer(torch.ones(1, width)).item())
    except Exception as error:  # of code that is not ours
        raise ValueError(
            f"the layers of ComfyUI-GGUF in {pack.folder} cannot be used as Raylight does: {error}; update both"
        ) from error
    if abs(results[1] - results[0] - width) > 0.01 * width + 0.01 * abs(results[0]):
        raise ValueError(
            f"the layers of ComfyUI-GGUF in {pack.folder} take LoRAs in a way that Raylight does not know: update both"
        )
