"""The mode of PyTorch in which a model is made, moved, patched and run: one for all of it, chosen here.

A weight that was made in inference mode and is moved outside of it (`Module.to` puts what it moves into the same
parameter) is spoilt for good: it looks like any other tensor but has no version counter, and the first view of it
raises "Inference tensors do not track version counter". Nothing of this is seen on a CPU, where nothing moves.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor

from raylight.host.checkpoint import MappedModel
from raylight.host.gguf import GgmlTensors
from raylight.host.recipe import REPLICATED
from raylight.parallel.process_group import smallest
from raylight.sharding.assign import set_parameter
from raylight.sharding.lazy_concat import LazyConcat

Method = TypeVar("Method", bound=Callable[..., Any])


@contextmanager
def mode_of(sharding: str) -> Iterator[None]:
    """Within it weights that are kept this way may be touched, whatever the mode around it.

    Whole ones in inference mode, as ComfyUI does all that it does: its quantised tensors can only be used in the mode
    that they were made in. Split ones outside of it and without gradients: not every version of FSDP2 can be used in
    inference mode.
    """
    # In this order: to leave inference mode turns gradients on.
    with torch.inference_mode(sharding == REPLICATED), torch.no_grad():
        yield


def in_own_mode(method: Method) -> Method:
    """A method of a patcher that touches weights, done in the mode of its `sharding`: ComfyUI makes room for one model
    by moving others, whatever mode the first is in."""

    @functools.wraps(method)
    def inner(self: Any, *args: Any, **kwargs: Any) -> Any:
        with mode_of(self.sharding):
            return method(self, *args, **kwargs)

    return inner  # type: ignore[return-value]


# As ComfyUI names and makes the entries of `ModelPatcher.backup`.
Backup = namedtuple("Dimension", ["weight", "inplace_update"])


class RankPatcher(comfy.model_patcher.ModelPatcher):
    """A patcher that makes the same decisions on every rank, and keeps no copy of weights that a file has.

    What is in the file is ComfyUI's backup of every weight: when the model leaves the GPU, or other patches are
    wanted, weights are taken from there, where all ranks share them, and not from a copy in each rank's memory.
    """

    sharding = REPLICATED

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.mapped: Mapping[str, Tensor] = {}

    def clone(self, *args: Any, **kwargs: Any) -> RankPatcher:
        other = super().clone(*args, **kwargs)
        other.mapped = self.mapped
        return other

    # Whatever of it ComfyUI calls to have weights moved or patched.
    partially_load = in_own_mode(comfy.model_patcher.ModelPatcher.partially_load)
    partially_unload = in_own_mode(comfy.model_patcher.ModelPatcher.partially_unload)
    patch_model = in_own_mode(comfy.model_patcher.ModelPatcher.patch_model)
    load = in_own_mode(comfy.model_patcher.ModelPatcher.load)
    detach = in_own_mode(comfy.model_patcher.ModelPatcher.detach)

    @in_own_mode
    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        super().unpatch_model(device_to, unpatch_weights)
        self.back_up()

    def back_up(self) -> None:
        """Let the weights in the file be what ComfyUI goes back to."""
        for key, weight in self.mapped.items():
            self.backup.setdefault(key, Backup(self.in_file(weight), False))

    def in_file(self, weight: Tensor) -> Tensor:
        """A weight of the file as the model can have it in its place."""
        return weight

    def get_free_memory(self, device: torch.device) -> int:
        """Free bytes on the fullest rank. Collective.

        ComfyUI batches conditionings by what is free; ranks that batched differently would meet in
        collectives of different shapes.
        """
        return smallest(int(super().get_free_memory(device)))


class GgufPatcher(RankPatcher):
    """Patches as ComfyUI-GGUF's own patcher does, but goes back to the file: its weights come from there each time
    that the model leaves the GPU."""

    ggml: GgmlTensors

    def clone(self, *args: Any, **kwargs: Any) -> GgufPatcher:
        other = super().clone(*args, **kwargs)
        other.ggml = self.ggml
        return other

    def in_file(self, weight: Tensor) -> Tensor:
        # One that is in the model is moved in place.
        return self.ggml.with_patches(weight, [])

    def patch_weight_to_device(
        self, key: str, device_to: torch.device | None = None, inplace_update: bool = False, **_: Any
    ) -> None:
        """Put the patches on a weight beside it where it is quantised, and into it, in float32, where it is not."""
        if key not in self.patches:
            return
        weight, patches = comfy.utils.get_attr(self.model, key), self.patches[key]
        device = weight.device if device_to is None else device_to
        self.backup.setdefault(key, Backup(self.in_file(self.mapped[key]), False))
        if self.ggml.is_quantised(weight):
            patched = self.ggml.with_patches(weight.to(device), [(patches, key)])
        else:
            # Not from the weight in the model: one that comes to the GPU late has its patches already.
            start = comfy.model_management.cast_to_device(self.mapped[key], device, torch.float32, copy=True)
            patched = comfy.lora.calculate_weight(patches, start, key)
            patched = comfy.float.stochastic_rounding(patched, weight.dtype)
        comfy.utils.set_attr_param(self.model, key, patched)

    def load(self, *args: Any, force_patch_weights: bool = False, **kwargs: Any) -> None:
        # What ComfyUI would add to weights that it casts on use is not looked at by the pack's layers.
        super().load(*args, force_patch_weights=True, **kwargs)

    def partially_unload(
        self, device_to: torch.device, memory_to_free: int = 0, force_patch_weights: bool = False
    ) -> int:
        return super().partially_unload(device_to, memory_to_free, force_patch_weights=True)


def build_replicated(mapped: MappedModel, offload_device: torch.device) -> tuple[RankPatcher, int]:
    """A patcher of all the weights of a mapped model. Those that are to have another dtype than in the file become a
    copy of this rank's own, of so many bytes, and so do those that the file has in several tensors."""
    diffusion_model = mapped.model.diffusion_model
    own_bytes = 0
    for name, parameter in list(diffusion_model.named_parameters()):
        if mapped.ggml is not None and mapped.ggml.is_quantised(parameter):
            continue
        dtype = mapped.dtypes.get(name, parameter.dtype)
        if isinstance(parameter, LazyConcat) or parameter.dtype != dtype:
            own = parameter.detach()[...].to(dtype)
            own_bytes += own.nbytes
            set_parameter(diffusion_model, name, own)
    if mapped.ggml is None:
        patcher = RankPatcher(mapped.model, mapped.load_device, offload_device)
    else:
        patcher = GgufPatcher(mapped.model, mapped.load_device, offload_device)
        patcher.ggml = mapped.ggml
    patcher.mapped = {
        f"diffusion_model.{name}": patcher.in_file(parameter.detach())
        for name, parameter in diffusion_model.named_parameters()
    }
    patcher.back_up()
    return patcher, own_bytes
