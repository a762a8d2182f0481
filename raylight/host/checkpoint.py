"""Build a model by ComfyUI's own loader, with its weights still in the mapped file."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import comfy.lora
import comfy.model_detection
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from comfy.model_base import BaseModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from raylight.sharding.lazy_concat import LazyConcat, LazyConcatMode
from raylight.sharding.subclass_weights import Flattened

from . import tensor_file
from .comfy_patches import replaced
from .log_messages import captured_log, first_few

# Names that tools for quantisation give to the scales of an 8-bit weight, and to the marker of a format.
_SCALE = re.compile(
    r"^(.*?)[._]?(weight)?[._](weight_scale(_2|_inv)?|scale_weight|scale_inv|scales?|input_scale|"
    r"scale_input|absmax|SCB|comfy_quant)$"
)


class QuantisedTensors(Protocol):
    """Operations on the quantised tensors of a GGUF file: `shape` is that of the weight, the storage is bytes."""

    def is_quantised(self, value: Tensor) -> bool:
        """Return whether it is such a tensor."""
        ...

    def with_patches(self, value: Tensor, patches: list[tuple[list[Any], str]]) -> Tensor:
        """Return another tensor of the same bytes, with these patches of ComfyUI's and no others."""
        ...

    def flatten(self, parameter: Tensor) -> Flattened | None:
        """Return the bytes of a quantised tensor, (weight rows, bytes of a row) uint8; else as `flatten_tensor`."""
        ...


@dataclass(frozen=True, slots=True)
class MappedModel:
    """A model whose weights are still in its file: they are read when they are used.

    `model` has its parameters in the dtypes of the file; `dtypes` are those that they are to have, by name. `lora_keys`
    maps names in LoRA files to keys of the state dict, and `shapes` has the weights' shapes by these keys. `ggml` is
    for models of a GGUF file. `unused` names tensors of the file that the model has no place for.
    """

    model: BaseModel
    dtypes: Mapping[str, torch.dtype]
    load_device: torch.device
    lora_keys: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    ggml: QuantisedTensors | None = None
    unused: tuple[str, ...] = ()


def load_mapped(path: str, model_options: dict[str, Any]) -> MappedModel:
    """Detect and build the model of a file. Raises as `build_from_loader`."""
    return build_from_loader(lambda options: comfy.sd.load_diffusion_model(path, model_options=options), model_options)


def build_from_loader(load: Callable[[dict[str, Any]], Any], model_options: dict[str, Any]) -> MappedModel:
    """Build the model that `load`, a loader of ComfyUI, makes with these options.

    Raises ValueError: when the file lacks a tensor of the model, when most of the file was not used (then it is another
    model), or when 8-bit weights were loaded without their scales. Raises what ComfyUI's loader raises for a file that
    is no diffusion model.
    """
    options = model_options | {"offload_device": torch.device("cpu")}
    with (
        # A worker can read whatever ComfyUI's process could.
        replaced(comfy.utils, "load_torch_file", tensor_file.tolerant_reader),
        # ComfyUI's `main.py` sets this name to choose a class of patchers, and a worker does not run `main.py`.
        replaced(comfy.model_patcher, "CoreModelPatcher", lambda _: _AssigningPatcher),
        _lazy_conversion() as unconverted,
        captured_log("unet unexpected"),  # logged once, with the file's name, and not by every rank
        WithoutMemory(),
    ):
        patcher = load(options)
    base = patcher.model
    _check_complete(base.diffusion_model)
    return MappedModel(
        base,
        patcher.dtypes,
        patcher.load_device,
        comfy.lora.model_lora_keys_unet(base, {}),
        {name: tuple(tensor.shape) for name, tensor in base.named_parameters()},
        unused=(*unconverted, *patcher.unused),
    )


class _AssigningPatcher(comfy.model_patcher.ModelPatcher):
    """Have ComfyUI's loader assign the file's tensors rather than copy them, and keep the dtypes that the model was
    built with.
    """

    def __init__(self, model: BaseModel, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        # ComfyUI 0.30 does this itself. Before, what is assigned would have to be able to have a gradient.
        model.diffusion_model.requires_grad_(False)
        self.dtypes = {name: parameter.dtype for name, parameter in model.diffusion_model.named_parameters()}
        self.unused: list[str] = []
        found: dict[str, Tensor] = {}

        def note(_: nn.Module, state_dict: Mapping[str, Tensor], *__: Any) -> None:
            found.update(state_dict)

        def check_excess(diffusion_model: nn.Module, keys: Any) -> None:
            for hook in hooks:
                hook.remove()
            self.unused += keys.unexpected_keys
            _check_size(found, self.unused, type(diffusion_model).__name__)
            _check_scales(found, self.unused, functools.partial(_parameter, diffusion_model))
            found.clear()

        hooks = (
            model.diffusion_model.register_load_state_dict_pre_hook(note),
            model.diffusion_model.register_load_state_dict_post_hook(check_excess),
        )

    def is_dynamic(self) -> bool:
        return True


class WithoutMemory(TorchFunctionMode):
    """Put on `meta` what modules allocate for weights that are loaded later, but not tables that they compute."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Modules pass on the device that they were built for, None; conversions of weights name a tensor's.
        if func is torch.empty and kwargs.get("device", ...) is None:
            kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


@contextmanager
def _lazy_conversion() -> Iterator[list[str]]:
    """Keep in the file what ComfyUI concatenates when it converts diffusers' names. Yields a list of the tensors that
    the conversion has no place for, which ComfyUI does not log.
    """
    unused: list[str] = []

    def lazy(convert: Any) -> Any:
        def convert_lazily(state_dict: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
            found = dict(state_dict)
            with LazyConcatMode():
                converted = convert(state_dict, *args, **kwargs)  # takes out what it uses
            if converted is not None:
                _check_scales(found, list(state_dict), found.get)
                unused.extend(state_dict)
            return converted

        return convert_lazily

    with replaced(comfy.model_detection, "convert_diffusers_mmdit", lazy):
        yield unused


def _check_complete(diffusion_model: nn.Module) -> None:
    for name, parameter in diffusion_model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"the tensor {name} is missing")
        if isinstance(parameter, LazyConcat) and not parameter.is_complete:
            raise ValueError(f"the tensor {name} is joined of several, and one of them is missing")
    for name, module in diffusion_model.named_modules():
        # A layer that may be quantised has no weight until one is loaded.
        if hasattr(module, "quant_format") or hasattr(module, "tensor_class"):
            if getattr(module, "weight", None) is None:
                raise ValueError(f"the tensor {name}.weight is missing")


def _check_size(found: Mapping[str, Tensor], unused: Collection[str], detected: str) -> None:
    """Raise ValueError if most elements of the tensors `found` in a file are unused: it is not the model `detected`."""
    of_all = sum(math.prod(tensor.shape) for tensor in found.values())
    of_unused = sum(math.prod(found[name].shape) for name in unused)
    if 2 * of_unused > of_all:
        raise ValueError(
            f"most of it ({of_unused / of_all:.0%}, in {len(unused)} tensors: {first_few(unused)}) has no place in "
            f"{detected}, which ComfyUI takes it for"
        )


def _check_scales(found: Mapping[str, Tensor], unused: Collection[str], loaded: Callable[[str], Tensor | None]) -> None:
    """Raise ValueError if 8-bit weights of the tensors `found` in a file were loaded without their scales, which would
    give noise. `loaded` maps a name in the file to what the model has of it.
    """
    lost = [name for name in unused if _is_lost_scale(found, name, loaded)]
    if lost:
        raise ValueError(
            f"it has weights of 8 bits with scales that ComfyUI does not know ({first_few(lost)}), and without them "
            f"the picture is noise. Take a file that is made for ComfyUI, or one of 16 bits"
        )


def _is_lost_scale(found: Mapping[str, Tensor], name: str, loaded: Callable[[str], Tensor | None]) -> bool:
    match = _SCALE.match("." + name)
    if match is None:
        return False
    weight = f"{match[1]}.weight".lstrip(".")
    if weight not in found or found[weight].dtype.itemsize != 1:
        return False
    value = loaded(weight)
    # A weight that is a tensor subclass has the scales of its format.
    if value is None or is_traceable_wrapper_subclass(value.data):
        return False
    return name.endswith("comfy_quant") or not bool((found[name].float() == 1).all())


def _parameter(model: nn.Module, name: str) -> Tensor | None:
    try:
        return model.get_parameter(name)
    except AttributeError:
        return None
