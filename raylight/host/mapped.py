"""A model as its file has it: built without memory, its weights still in the memory-mapped file.

ComfyUI's own loader detects the model and converts the names; only where the weights end up differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from comfy.model_base import BaseModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, slots=True)
class MappedModel:
    """`model` has parameters on `meta`, in the dtype they are to have; `weights` are their values by name, in the
    dtype of the file and read from it only when used."""

    model: BaseModel
    weights: dict[str, Tensor]
    load_device: torch.device


def load_mapped(path: str, model_options: dict[str, Any]) -> MappedModel:
    """Detect and build the model of a safetensors file.

    Raises ValueError naming the first tensor that the model needs and the file lacks, and one for a file with
    quantised weights; whatever ComfyUI's loader raises for a file that is no diffusion model.
    """
    options = model_options | {"offload_device": torch.device("cpu")}
    with _assigning_patcher(), _WithoutMemory():
        patcher = comfy.sd.load_diffusion_model(path, model_options=options)
    diffusion_model, blueprint = patcher.model.diffusion_model, patcher.blueprint
    weights = {}
    for name, parameter in list(diffusion_model.named_parameters()):
        if parameter.is_meta:
            raise ValueError(f"the tensor {name} is missing")
        if type(parameter.data) is not Tensor:
            raise ValueError(f"its tensor {name} is quantised, which FSDP cannot split in this version: switch FSDP "
                             f"off, or take the model in bf16, fp16 or fp8 without scales")
        weights[name] = parameter.detach()
        planned = blueprint.get(name, torch.empty_like(parameter, device="meta"))
        owner, _, leaf = name.rpartition(".")
        setattr(diffusion_model.get_submodule(owner), leaf, nn.Parameter(planned, requires_grad=False))
    return MappedModel(patcher.model, weights, patcher.load_device)


class _AssigningPatcher(comfy.model_patcher.ModelPatcher):
    """Has ComfyUI's loader assign the file's tensors rather than copy them; keeps what the model was built with."""

    def __init__(self, model: BaseModel, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.blueprint = {name: torch.empty_like(parameter, device="meta")
                          for name, parameter in model.diffusion_model.named_parameters()}

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
    """ComfyUI's `main.py` chooses its patcher class by setting this name, and a worker does not run `main.py`.

    Raises RuntimeError where ComfyUI no longer has it.
    """
    standard = getattr(comfy.model_patcher, "CoreModelPatcher", None)
    if standard is None:
        raise RuntimeError("this ComfyUI has no comfy.model_patcher.CoreModelPatcher, by which FSDP loads a model "
                           "without a copy: switch FSDP off, or update Raylight")
    comfy.model_patcher.CoreModelPatcher = _AssigningPatcher
    try:
        yield
    finally:
        comfy.model_patcher.CoreModelPatcher = standard
