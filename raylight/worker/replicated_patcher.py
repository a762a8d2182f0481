"""ComfyUI's patcher of a model that every rank holds in full: its weights are on the GPU, or still in their file."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from raylight.host.checkpoint import MappedModel, QuantisedTensors
from raylight.host.patcher_state import DIFFUSION_MODEL
from raylight.parallel.heartbeat import cancellation_point
from raylight.sharding import staged_read
from raylight.sharding.assign import set_parameter
from raylight.sharding.file_weight import FileWeight
from raylight.sharding.lazy_concat import LazyConcat
from raylight.sharding.subclass_weights import flatten_tensor

from . import load_progress, reading_together
from .load_progress import ReadingStopped
from .patcher import RankPatcher, in_own_mode

# As ComfyUI names and makes the entries of `ModelPatcher.backup`.
Backup = namedtuple("Dimension", ["weight", "inplace_update"])


@dataclass(frozen=True, slots=True)
class FileWeights:
    """The weights of a model as its file has them, by key of the state dict and in the order of the file; all ranks
    share their memory.
    """

    tensors: Mapping[str, Tensor]
    ggml: QuantisedTensors | None = None

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], ggml: QuantisedTensors | None) -> FileWeights:
        """Return these weights by key, in the order of the file."""
        found = cls(weights, ggml)
        keys = sorted(weights, key=lambda key: min(part.data_ptr() for part in found.stored(weights[key])))
        return cls({key: weights[key] for key in keys}, ggml)

    def original(self, key: str) -> Tensor:
        """Return the weight for the model to have in its place, where it may be moved or written to."""
        weight = self.tensors[key]
        if isinstance(weight, FileWeight):
            return FileWeight.of(weight, weight.dtype)
        return weight if self.ggml is None else self.ggml.with_patches(weight, [])

    def stored(self, weight: Tensor) -> list[Tensor]:
        """Return the plain tensors that a weight in the file consists of."""
        if isinstance(weight, FileWeight):
            return weight.file_tensors
        flat = self._flatten(weight)
        return [weight] if flat is None else list(flat.components.values())

    def read(self, weight: Tensor, device: torch.device) -> Tensor:
        """Return a weight of the model on a device. Raises as `copy_weight`."""
        if isinstance(weight, FileWeight):
            return weight.read(device)
        flat = self._flatten(weight)
        if flat is None:
            return FileWeight.of(weight.data, weight.dtype).read(device)
        return flat.rebuild(
            {name: FileWeight.of(part, part.dtype).read(device) for name, part in flat.components.items()}
        )

    def _flatten(self, weight: Tensor) -> Any:
        return (flatten_tensor if self.ggml is None else self.ggml.flatten)(weight)


class ReplicatedPatcher(RankPatcher):
    """A patcher that keeps no copy of weights that a file has.

    The file is ComfyUI's backup of every weight: when the model leaves the GPU, or other patches are wanted, weights
    come from there, and not from a copy in each rank's memory.
    """

    weights: FileWeights

    @contextmanager
    def moving(self) -> Iterator[None]:
        # Otherwise `Module.to` would give a `FileWeight` the memory of what it was moved to.
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            yield
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)

    @in_own_mode
    def partially_load(self, device_to: torch.device, extra_memory: int = 0, force_patch_weights: bool = False) -> int:
        """Read and patch as many weights as ComfyUI decides on this rank, then agree with the others whether to cancel.
        A rank that is asked to cancel reads no further. Collective.

        Raises RunCancelled: if a rank was asked to cancel.
        """
        reported = load_progress.reported(lambda: self._bytes_to_read(device_to), may_stop=True)
        try:
            with reading_together.agreed_once(), reported:
                added = super().partially_load(device_to, extra_memory, force_patch_weights)
        except ReadingStopped:
            self.detach()
            cancellation_point()
            raise
        cancellation_point()
        return added

    @in_own_mode
    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: int = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        """Read and patch weights; with `full_load` read all in the order of the file, before any is patched, together
        with the other ranks where all do so. Collective within `partially_load`.
        """
        self.back_up()
        if full_load and device_to is not None:
            self._read_all(device_to)
        else:
            reading_together.decline()
        super().load(
            device_to,
            lowvram_model_memory=lowvram_model_memory,
            force_patch_weights=force_patch_weights,
            full_load=full_load,
        )

    @in_own_mode
    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        super().unpatch_model(device_to, unpatch_weights)
        self.back_up()

    def pin_weight_to_device(self, key: str) -> None:
        """Do nothing: to pin a page of a mapped file is to copy it."""

    def back_up(self) -> None:
        """Let ComfyUI go back to the weights in the file."""
        for key in self.weights.tensors:
            self.back_up_weight(key)

    def back_up_weight(self, key: str) -> None:
        """Let ComfyUI go back to this weight in the file, unless it has a backup of it already."""
        if key not in self.backup:
            self.backup[key] = Backup(self.weights.original(key), False)

    def _read_all(self, device: torch.device) -> None:
        keys = self._elsewhere(device)
        with staged_read.collected() as copies:
            read = {key: self.weights.read(comfy.utils.get_attr(self.model, key), device) for key in keys}
        name = type(self.model.diffusion_model).__name__
        if not (keys and reading_together.read_together(copies, keys, device, name)):
            for index, copy in enumerate(copies):
                for following in copies[index + 1 : index + 2]:
                    staged_read.advise(following.source)
                staged_read.copy_weight(copy.source, copy.destination, copy.through)
        for key, weight in read.items():
            comfy.utils.set_attr_param(self.model, key, weight)

    def _bytes_to_read(self, device: torch.device) -> int:
        return sum(
            part.nbytes for key in self._elsewhere(device) for part in self.weights.stored(self.weights.tensors[key])
        )

    def _elsewhere(self, device: torch.device) -> list[str]:
        """Return the keys of weights that are not on a device, but for those of modules that a node has replaced."""
        found = dict(self.model.named_parameters(remove_duplicate=False))
        return [key for key in self.weights.tensors if key in found and found[key].device != device]


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


def build_replicated(
    mapped: MappedModel, offload_device: torch.device, in_file: bool | None = None
) -> tuple[ReplicatedPatcher, int]:
    """Return a patcher of a mapped model with all weights, and how many bytes of them are this rank's own memory.

    None are where weights stay `in_file` until they go to a GPU (None: if the model is for one). Otherwise those are
    copied that need another dtype than in the file, and those that the file has in several tensors.
    """
    diffusion_model, ggml = mapped.model.diffusion_model, mapped.ggml
    in_file = mapped.load_device.type != "cpu" if in_file is None else in_file
    own_bytes = 0
    for name, parameter in list(diffusion_model.named_parameters()):
        if (flatten_tensor if ggml is None else ggml.flatten)(parameter) is not None:
            continue
        weight: Tensor = FileWeight.of(parameter, mapped.dtypes.get(name, parameter.dtype))
        if not in_file:
            if not isinstance(parameter, LazyConcat) and parameter.dtype == weight.dtype:
                continue
            weight = weight.read()
            own_bytes += weight.nbytes
        set_parameter(diffusion_model, name, weight)
    weights = {DIFFUSION_MODEL + name: weight.detach() for name, weight in diffusion_model.named_parameters()}
    if ggml is not None:  # tensors of its own: those in the model are moved in place
        weights = {key: ggml.with_patches(weight, []) for key, weight in weights.items()}
    kind = ReplicatedPatcher if ggml is None else GgufPatcher
    patcher = kind(mapped.model, mapped.load_device, offload_device)
    patcher.weights = FileWeights.of(weights, ggml)
    patcher.back_up()
    return patcher, own_bytes
