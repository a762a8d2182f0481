"""Build ComfyUI's VAE of a file by ComfyUI's own detection, with its weights still in the mapped file."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from torch import Tensor, nn

from raylight.sharding.assign import set_parameter, set_tensor

from . import tensor_file
from .checkpoint import WithoutMemory
from .comfy_patches import replaced
from .loading import file_errors
from .log_messages import captured_log, first_few
from .model_files import here
from .vae_jobs import VaeRecipe

logger = logging.getLogger(__name__)

# What a file may lack that can only encode, or only decode, by the first part of a weight's name.
_OF_DECODER = ("previewer",)
_OF_ENCODER = ("encoder", "taesd_encoder", "dconv_encoder", "quant_conv", "conv1")


@dataclass(frozen=True, slots=True)
class MappedVae:
    """A `comfy.sd.VAE` whose parameters are tensors of its file; `dtypes` are those that they are to have, by name.

    `missing` names weights that the file lacks, all of the encoder or of the decoder, which are zeros.
    """

    vae: Any
    dtypes: Mapping[str, torch.dtype]
    missing: frozenset[str] = frozenset()

    @property
    def has_encoder(self) -> bool:
        """Whether it can encode."""
        return not any(_part(name) in _OF_ENCODER for name in self.missing)

    @property
    def has_decoder(self) -> bool:
        """Whether it can decode."""
        return not any(_part(name) in _OF_DECODER for name in self.missing)


def map_vae(recipe: VaeRecipe) -> MappedVae:
    """Build the VAE of a recipe; its weights stay in the file.

    Raises ValueError: for a file that is no VAE, or that lacks a tensor which decoding needs; the message names it.
    """
    with file_errors(recipe), torch.inference_mode():
        tensors, metadata = _read(recipe)
        vae = _build(tensors, metadata)
        if vae.first_stage_model is None:
            raise ValueError(
                f"its tensors ({first_few(tensors)}) are not those of a VAE. Choose a file of models/vae that is made "
                f"for the diffusion model"
            )
        vae.vae_dtype = getattr(torch, recipe.weight_dtype) if recipe.weight_dtype else vae.vae_dtype
        missing = _complete(vae.first_stage_model, vae.vae_dtype, vae.patcher.missing)
        return MappedVae(vae, _dtypes(vae), missing)


def structure(model: nn.Module) -> list[tuple[str, str]]:
    """Return the path and class of each module of a VAE, by which two builds of it are compared."""
    return [(path, f"{type(module).__module__}.{type(module).__qualname__}") for path, module in model.named_modules()]


def _read(recipe: VaeRecipe) -> tuple[dict[str, Tensor], Any]:
    if recipe.export is not None:
        return tensor_file.by_header(recipe.path)
    read = tensor_file.tolerant_reader(comfy.utils.load_torch_file)
    return read(here(recipe.path), safe_load=True, return_metadata=True)


def _build(tensors: dict[str, Tensor], metadata: Any) -> Any:
    with (
        replaced(comfy.model_patcher, "CoreModelPatcher", lambda _: _AssigningPatcher),
        # Some classes are never moved in part, and have ComfyUI's plain patcher.
        replaced(comfy.model_patcher, "ModelPatcher", lambda _: _AssigningPatcher),
        # Its operations cannot be followed by rows, and those of PyTorch's attention can.
        replaced(comfy.model_management, "xformers_enabled_vae", lambda _: lambda: False),
        captured_log("Missing VAE keys", "WARNING: No VAE weights", "VAE load device"),
        WithoutMemory(),
    ):
        return comfy.sd.VAE(sd=dict(tensors), metadata=metadata)


class _AssigningPatcher(comfy.model_patcher.ModelPatcher):
    """Have ComfyUI's loader assign the file's tensors rather than copy them."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.missing: list[str] = []
        model.requires_grad_(False)  # what is assigned would have to be able to have a gradient

        def note(_: nn.Module, keys: Any) -> None:
            hook.remove()
            self.missing += keys.missing_keys

        hook = model.register_load_state_dict_post_hook(note)

    def is_dynamic(self) -> bool:
        return True


def _complete(model: nn.Module, dtype: torch.dtype, missing: Iterable[str]) -> frozenset[str]:
    """Return which weights of the encoder or the decoder the file lacks; they are zeros.

    Raises ValueError: for any other weight that it lacks. Numbers and buffers that files leave out have a default.
    """
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    lacking = [name for name in missing if (name in parameters and parameters[name].ndim > 0)]
    lacking += [name for name, tensor in (parameters | buffers).items() if tensor.is_meta and name not in lacking]
    for name in lacking:
        if _part(name) not in _OF_ENCODER + _OF_DECODER:
            raise ValueError(f"the tensor {name} is missing: the file is incomplete. Download it again")
    for name in lacking:
        if name in parameters:
            set_parameter(model, name, torch.zeros(parameters[name].shape, dtype=dtype))
        else:
            set_tensor(model, name, torch.zeros(buffers[name].shape, dtype=dtype))
    return frozenset(lacking)


def _part(name: str) -> str:
    return name.partition(".")[0]


def _dtypes(vae: Any) -> dict[str, torch.dtype]:
    """Return the dtypes of the parameters in ComfyUI's own VAE, and convert buffers to theirs."""
    model, dtype = vae.first_stage_model, vae.vae_dtype
    for name, buffer in list(model.named_buffers()):
        if buffer.is_floating_point() and buffer.dtype != dtype:
            set_tensor(model, name, buffer.to(dtype))
    for name, parameter in list(model.named_parameters()):
        if parameter.requires_grad:  # assigned tensors have the flag of those that they replace
            set_parameter(model, name, parameter.detach())
    return {
        name: dtype if parameter.is_floating_point() else parameter.dtype
        for name, parameter in model.named_parameters()
    }
