"""What a file has and its model has no place for: left-overs that ComfyUI warns of, or the sign of a wrong picture."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

from . import tensor_file
from .notices import held_back, some

# Names that makers of quantised files give to what a weight of 8 bits is multiplied by, and to the marker of a format.
_SCALE = re.compile(
    r"^(.*?)[._]?(weight)?[._](weight_scale(_2|_inv)?|scale_weight|scale_inv|scales?|input_scale|"
    r"scale_input|absmax|SCB|comfy_quant)$"
)


def check_size(found: Mapping[str, Tensor], unused: Collection[str], taken_for: str) -> None:
    """Raises ValueError where most elements of the tensors `found` in a file were not used for the model: then it is
    another model than it was taken for."""
    of_all = sum(math.prod(tensor.shape) for tensor in found.values())
    of_unused = sum(math.prod(found[name].shape) for name in unused)
    if 2 * of_unused > of_all:
        raise ValueError(
            f"most of it ({of_unused / of_all:.0%}, in {len(unused)} tensors: {some(unused)}) has no "
            f"place in {taken_for}, which ComfyUI takes it for"
        )


def check_scales(found: Mapping[str, Tensor], unused: Collection[str], loaded: Callable[[str], Tensor | None]) -> None:
    """Raises ValueError where 8-bit weights of those `found` in a file were loaded without their scales: a picture of
    such weights is noise. `loaded` tells what a weight of the file has become in the model."""
    lost = [name for name in unused if _is_lost_scale(found, name, loaded)]
    if lost:
        raise ValueError(
            f"it has weights of 8 bits with scales that ComfyUI does not know ({some(lost)}), and without "
            f"them the picture is noise. Take a file that is made for ComfyUI, or one of 16 bits"
        )


def parameter_of(model: nn.Module, name: str) -> Tensor | None:
    """A parameter by its name, None where there is none."""
    try:
        return model.get_parameter(name)
    except AttributeError:
        return None


def _is_lost_scale(found: Mapping[str, Tensor], name: str, loaded: Callable[[str], Tensor | None]) -> bool:
    match = _SCALE.match("." + name)
    if match is None:
        return False
    weight = f"{match[1]}.weight".lstrip(".")
    if weight not in found or found[weight].dtype.itemsize != 1:
        return False
    value = loaded(weight)
    # A weight that is made of tensors has the scales of its format.
    if value is None or is_traceable_wrapper_subclass(value.data):
        return False
    return name.endswith("comfy_quant") or not bool((found[name].float() == 1).all())


if TYPE_CHECKING:
    from .gguf import GgmlTensors


@dataclass(frozen=True, slots=True)
class MappedModel:
    """`model` has parameters in the dtype of the file, read from it only when used; `dtypes` are those that they are
    to have, by name. `lora_keys` maps names in LoRA files to the model's weights, and `shapes` has these weights' by
    their names in the state dict, as ComfyUI's patcher takes them. `ggml` knows quantised weights of a GGUF file.
    `unused` are the tensors of the file that the model has no place for."""

    model: BaseModel
    dtypes: Mapping[str, torch.dtype]
    load_device: torch.device
    lora_keys: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    ggml: GgmlTensors | None = None
    unused: tuple[str, ...] = ()


def load_mapped(path: str, model_options: dict[str, Any]) -> MappedModel:
    """Detect and build the model of a file. Raises as `build_from_loader`."""
    return build_from_loader(lambda options: comfy.sd.load_diffusion_model(path, model_options=options), model_options)


def build_from_loader(load: Callable[[dict[str, Any]], Any], model_options: dict[str, Any]) -> MappedModel:
    """The model that a loader of ComfyUI's makes with these options.

    Raises ValueError naming the first tensor that the model needs and the file lacks, or one of those in excess where
    they are what `excess` refuses; whatever ComfyUI's loader raises for a file that is no diffusion model.
    """
    options = model_options | {"offload_device": torch.device("cpu")}
    # What is in excess is told with the file's name, and not by every rank.
    with (
        _tolerant_reader(),
        _assigning_patcher(),
        _joining_conversion() as unconverted,
        held_back("unet unexpected"),
        _WithoutMemory(),
    ):
        patcher = load(options)
    base = patcher.model
    _check_complete(base.diffusion_model)
    shapes = {name: tuple(tensor.shape) for name, tensor in base.named_parameters()}
    return MappedModel(
        base,
        patcher.dtypes,
        patcher.load_device,
        comfy.lora.model_lora_keys_unet(base, {}),
        shapes,
        unused=(*unconverted, *patcher.unused),
    )


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


class _AssigningPatcher(comfy.model_patcher.ModelPatcher):
    """Has ComfyUI's loader assign the file's tensors rather than copy them; keeps what the model was built with."""

    def __init__(self, model: BaseModel, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        # ComfyUI 0.30 does this itself. Before, what is assigned would have to be able to have a gradient.
        model.diffusion_model.requires_grad_(False)
        self.dtypes = {name: parameter.dtype for name, parameter in model.diffusion_model.named_parameters()}
        self.unused: list[str] = []
        found: dict[str, torch.Tensor] = {}

        def note(_: nn.Module, state_dict: Mapping[str, torch.Tensor], *__: Any) -> None:
            found.update(state_dict)

        def check_excess(diffusion_model: nn.Module, keys: Any) -> None:
            for hook in hooks:
                hook.remove()
            self.unused += keys.unexpected_keys
            check_size(found, self.unused, type(diffusion_model).__name__)
            check_scales(found, self.unused, functools.partial(parameter_of, diffusion_model))
            found.clear()

        hooks = (
            model.diffusion_model.register_load_state_dict_pre_hook(note),
            model.diffusion_model.register_load_state_dict_post_hook(check_excess),
        )

    def is_dynamic(self) -> bool:
        return True


class _WithoutMemory(TorchFunctionMode):
    """What modules allocate for weights that are yet to come is put on `meta`. Tables that they compute are not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Modules pass on the device that they were built for, None; conversions of weights name a tensor's.
        if func is torch.empty and kwargs.get("device", ...) is None:
            kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


@contextmanager
def _assigning_patcher() -> Iterator[None]:
    """ComfyUI's `main.py` chooses its patcher class by setting this name, and a worker does not run `main.py`."""
    with _replaced(comfy.model_patcher, "CoreModelPatcher", lambda _: _AssigningPatcher):
        yield


@contextmanager
def _tolerant_reader() -> Iterator[None]:
    """Whatever ComfyUI's process could read, a worker can."""
    with _replaced(comfy.utils, "load_torch_file", tensor_file.tolerant):
        yield


@contextmanager
def _joining_conversion() -> Iterator[list[str]]:
    """Files with diffusers' names: what ComfyUI puts together of several tensors stays in the file, too. Gives a list
    of what has no place in the conversion, of which ComfyUI says nothing."""
    unused: list[str] = []

    def joining(convert: Any) -> Any:
        def convert_without_memory(state_dict: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
            found = dict(state_dict)
            with LazyConcatMode():
                converted = convert(state_dict, *args, **kwargs)  # takes out what it uses
            if converted is not None:
                check_scales(found, list(state_dict), found.get)
                unused.extend(state_dict)
            return converted

        return convert_without_memory

    with _replaced(comfy.model_detection, "convert_diffusers_mmdit", joining):
        yield unused


@contextmanager
def _replaced(module: Any, name: str, replacement: Callable[[Any], Any]) -> Iterator[None]:
    """Let a name of ComfyUI's be another thing for a while. Raises RuntimeError where ComfyUI no longer has it."""
    standard = getattr(module, name, None)
    if standard is None:
        raise RuntimeError(
            f"this ComfyUI has no {module.__name__}.{name}, by which workers load a model without a "
            f"copy: update Raylight"
        )
    setattr(module, name, replacement(standard))
    try:
        yield
    finally:
        setattr(module, name, standard)
