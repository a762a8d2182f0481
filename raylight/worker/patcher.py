"""ComfyUI's patcher of a model that every rank holds in full, and the mode of PyTorch in which weights are touched."""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor

from raylight.host.checkpoint import MappedModel, QuantisedTensors
from raylight.host.patcher_state import DIFFUSION_MODEL
from raylight.host.recipe import REPLICATED
from raylight.parallel.process_group import smallest
from raylight.sharding.assign import set_parameter
from raylight.sharding.lazy_concat import LazyConcat

Method = TypeVar("Method", bound=Callable[..., Any])


@contextmanager
def mode_of(sharding: str) -> Iterator[None]:
    """Within it weights that are kept this way may be made, moved, patched and used, whatever the mode around it.

    Replicated ones in inference mode, as ComfyUI does all that it does: its quantised tensors can only be used in the
    mode in which they were made. Sharded ones outside of it and without gradients: not every version of FSDP2 can be
    used in inference mode.

    One mode for all of it, because a weight that was made in inference mode and is moved outside of it (`Module.to`
    puts what it moves into the same parameter) is spoilt: it has no version counter, and the first view of it raises
    "Inference tensors do not track version counter". A CPU shows nothing of this, as nothing moves there.
    """
    # In this order: to leave inference mode turns gradients on.
    with torch.inference_mode(sharding == REPLICATED), torch.no_grad():
        yield


def in_own_mode(method: Method) -> Method:
    """Run a patcher's method that touches weights in the mode of its `sharding`: ComfyUI makes room for one model by
    moving others, in whatever mode the first one is.
    """

    @functools.wraps(method)
    def inner(self: Any, *args: Any, **kwargs: Any) -> Any:
        with mode_of(self.sharding):
            return method(self, *args, **kwargs)

    return inner  # type: ignore[return-value]


class RankPatcher(comfy.model_patcher.ModelPatcher):
    """A patcher that makes the same decisions on every rank.

    `weights` is what a subclass knows of the model's weights; all clones share it.
    """

    sharding = REPLICATED
    weights: Any = None

    def clone(self, *args: Any, **kwargs: Any) -> RankPatcher:
        other: Any = super().clone(*args, **kwargs)
        other.weights = self.weights
        return other

    # All that ComfyUI calls to have weights moved or patched.
    partially_load = in_own_mode(comfy.model_patcher.ModelPatcher.partially_load)
    partially_unload = in_own_mode(comfy.model_patcher.ModelPatcher.partially_unload)
    patch_model = in_own_mode(comfy.model_patcher.ModelPatcher.patch_model)
    unpatch_model = in_own_mode(comfy.model_patcher.ModelPatcher.unpatch_model)
    load = in_own_mode(comfy.model_patcher.ModelPatcher.load)
    detach = in_own_mode(comfy.model_patcher.ModelPatcher.detach)

    def get_free_memory(self, device: torch.device) -> int:
        """Return the free bytes on the fullest rank. Collective.

        ComfyUI batches conditionings by what is free; ranks that batched differently would meet in collectives of
        different shapes.
        """
        return smallest(int(super().get_free_memory(device)))


# As ComfyUI names and makes the entries of `ModelPatcher.backup`.
Backup = namedtuple("Dimension", ["weight", "inplace_update"])


@dataclass(frozen=True, slots=True)
class FileWeights:
    """The weights of a model as its file has them, by key of the state dict; all ranks share their memory."""

    tensors: Mapping[str, Tensor]
    ggml: QuantisedTensors | None = None

    def original(self, key: str) -> Tensor:
        """Return the weight for the model to have in its place; ComfyUI moves it in place where it is quantised."""
        weight = self.tensors[key]
        return weight if self.ggml is None else self.ggml.with_patches(weight, [])


class ReplicatedPatcher(RankPatcher):
    """A patcher that keeps no copy of weights that a file has.

    The file is ComfyUI's backup of every weight: when the model leaves the GPU, or other patches are wanted, weights
    come from there, and not from a copy in each rank's memory.
    """

    weights: FileWeights

    @in_own_mode
    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        super().unpatch_model(device_to, unpatch_weights)
        self.back_up()

    def back_up(self) -> None:
        """Let ComfyUI go back to the weights in the file."""
        for key in self.weights.tensors:
            self.back_up_weight(key)

    def back_up_weight(self, key: str) -> None:
        """Let ComfyUI go back to this weight in the file, unless it has a backup of it already."""
        if key not in self.backup:
            self.backup[key] = Backup(self.weights.original(key), False)


class GgufPatcher(ReplicatedPatcher):
    """Patch as ComfyUI-GGUF's own patcher does, with the file as the backup."""

    def patch_weight_to_device(
        self, key: str, device_to: torch.device | None = None, inplace_update: bool = False, **_: Any
    ) -> None:
        """Put the patches beside a weight that is quantised, and add them in float32 to one that is not."""
        if key not in self.patches:
            return
        ggml = self.weights.ggml
        assert ggml is not None
        weight, patches = comfy.utils.get_attr(self.model, key), self.patches[key]
        device = weight.device if device_to is None else device_to
        self.back_up_weight(key)
        if ggml.is_quantised(weight):
            patched = ggml.with_patches(weight.to(device), [(patches, key)])
        else:
            # Not from the weight in the model: one that comes to the GPU late has its patches already.
            start = comfy.model_management.cast_to_device(self.weights.tensors[key], device, torch.float32, copy=True)
            patched = comfy.lora.calculate_weight(patches, start, key)
            patched = comfy.float.stochastic_rounding(patched, weight.dtype)
        comfy.utils.set_attr_param(self.model, key, patched)

    def load(self, *args: Any, force_patch_weights: bool = False, **kwargs: Any) -> None:
        # The pack's layers do not look at what ComfyUI would add to weights that it casts on use.
        super().load(*args, force_patch_weights=True, **kwargs)

    def partially_unload(
        self, device_to: torch.device, memory_to_free: int = 0, force_patch_weights: bool = False
    ) -> int:
        return super().partially_unload(device_to, memory_to_free, force_patch_weights=True)


def build_replicated(mapped: MappedModel, offload_device: torch.device) -> tuple[ReplicatedPatcher, int]:
    """Return a patcher of a mapped model with all weights, and how many bytes of them are this rank's own memory:
    those that need another dtype than in the file, and those that the file has in several tensors, are copied.
    """
    diffusion_model, ggml = mapped.model.diffusion_model, mapped.ggml
    own_bytes = 0
    for name, parameter in list(diffusion_model.named_parameters()):
        if ggml is not None and ggml.is_quantised(parameter):
            continue
        dtype = mapped.dtypes.get(name, parameter.dtype)
        if isinstance(parameter, LazyConcat) or parameter.dtype != dtype:
            own = parameter.detach()[...].to(dtype)
            own_bytes += own.nbytes
            set_parameter(diffusion_model, name, own)
    in_file = {DIFFUSION_MODEL + name: weight.detach() for name, weight in diffusion_model.named_parameters()}
    if ggml is not None:  # tensors of its own: those in the model are moved in place
        in_file = {key: ggml.with_patches(weight, []) for key, weight in in_file.items()}
    kind = ReplicatedPatcher if ggml is None else GgufPatcher
    patcher = kind(mapped.model, mapped.load_device, offload_device)
    patcher.weights = FileWeights(in_file, ggml)
    patcher.back_up()
    return patcher, own_bytes
