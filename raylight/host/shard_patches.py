"""Patches (LoRA and its kin) on weights that are split over ranks.

What a patch does to a weight is ComfyUI's `calculate_weight` and `stochastic_rounding`, as in its own patcher. A rank
computes its own rows where rows do not depend on each other; else every rank gathers that one weight, does what ComfyUI
does to a whole one, and keeps its rows. The rows as they were stay in host memory, one copy over all ranks, so that
other patches need no file. Weights of GGUF files stay as they are: their layers add patches when they use them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from raylight.parallel.pulse import checkpoint
from raylight.sharding import packed
from raylight.sharding.rows import gather_rows, rows_of

from .gguf import PatchedOnUse
from .patch_rows import Patch, of_rows

PREFIX = "diffusion_model."
# Of these, rounding is the same for a row as for the whole; ComfyUI rounds others with noise over the whole weight.
_ROUNDED_BY_ROW = (torch.float32, torch.float16, torch.bfloat16)


class ShardPatches:
    """The patches on one split model, and what its weights were before."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype) -> None:
        self._model = model
        self._mesh = mesh
        self._device = device
        self._dtype = dtype
        self._on_use = _patched_on_use(model)
        self._before: dict[str, dict[str, Tensor]] = {}
        self._now: Any = None

    def apply(self, patches: Mapping[str, list[Patch]], version: Any) -> None:
        """Let the weights be those of the file with `patches` (of ComfyUI's patcher) and no others. Collective.

        Does nothing when `version` is that of the last call. Raises ValueError, naming the weight, for a patch that
        would change its shape.
        """
        if self._now == version:
            return
        self._now = None
        wanted = {key.removeprefix(PREFIX): value for key, value in patches.items() if key.startswith(PREFIX)}
        for name, weight in self._on_use.items():
            weight.patches = [(wanted.pop(name), PREFIX + name)] if name in wanted else []
        for name in [name for name in self._before if name not in wanted]:
            self._write(name, self._before.pop(name))
        for name, of_weight in wanted.items():
            checkpoint()
            if name not in self._before:
                self._before[name] = {part: held.cpu().clone() for part, held in self._held(name).items()}
            self._write(name, self._patched(name, of_weight))
        self._now = version

    def host_bytes(self) -> int:
        """The memory of weights as they were before."""
        return sum(part.nbytes for parts in self._before.values() for part in parts.values())

    def _patched(self, name: str, patches: list[Patch]) -> dict[str, Tensor]:
        module, leaf = self._place(name)
        before = self._before[name]
        if leaf in packed.packed_weights(module):
            return self._patched_packed(name, module, leaf, patches)
        parameter = self._model.get_parameter(name)
        if comfy.lora.calculate_shape(patches, parameter, name) != parameter.shape:
            raise ValueError(f"the LoRA changes the shape of {name}, which a split weight cannot: switch FSDP off")
        if not isinstance(parameter, DTensor):
            return {"": self._calculated(name, before[""], patches)}
        rows = rows_of(parameter.shape[0], self._mesh.size(), self._mesh.get_local_rank())
        by_row = of_rows(patches, rows, parameter.shape[0]) if parameter.dtype in _ROUNDED_BY_ROW else None
        if by_row is not None:
            return {"": self._calculated(name, before[""], by_row)}
        return {"": self._calculated(name, self._gathered(before[""], parameter), patches)[rows]}

    def _calculated(self, name: str, weight: Tensor, patches: list[Patch]) -> Tensor:
        start = comfy.model_management.cast_to_device(weight, self._device, self._dtype, copy=True)
        key = PREFIX + name
        out = comfy.lora.calculate_weight(patches, start, key)
        return comfy.float.stochastic_rounding(out, weight.dtype, seed=comfy.utils.string_to_seed(key))

    def _patched_packed(self, name: str, module: nn.Module, leaf: str, patches: list[Patch]) -> dict[str, Tensor]:
        attributes = packed.parts_of(module, leaf)
        before = self._before[name]
        parameters = {part: getattr(module, attribute) for part, attribute in attributes.items()}
        whole = packed.put_together(module, leaf, {
            part: self._gathered(before[part], parameter) if isinstance(parameter, DTensor)
            else before[part].to(self._device) for part, parameter in parameters.items()
        })
        key = PREFIX + name
        # Its own functions for this, on a stand-in: the layer itself has no whole weight.
        layer = SimpleNamespace(**{leaf: whole}, layout_type=getattr(module, "layout_type", None))
        start = comfy.model_management.cast_to_device(whole, self._device, self._dtype, copy=True)
        start = getattr(type(module), f"convert_{leaf}")(layer, start, inplace=True)
        out = comfy.lora.calculate_weight(patches, start, key)
        out = getattr(type(module), f"set_{leaf}")(layer, out, seed=comfy.utils.string_to_seed(key), return_weight=True)
        made = packed.parts_as_held(out)
        result = {}
        for part, parameter in parameters.items():
            if made[part].shape != parameter.shape:
                raise ValueError(f"the LoRA changes the quantisation of {name}, which a split weight cannot: switch "
                                 f"FSDP off")
            rows = rows_of(parameter.shape[0], self._mesh.size(), self._mesh.get_local_rank()) if isinstance(
                parameter, DTensor) else ...
            result[part] = made[part][rows]
        return result

    def _gathered(self, local: Tensor, parameter: DTensor) -> Tensor:
        return gather_rows(local.to(self._device), parameter.shape[0], self._mesh)

    def _place(self, name: str) -> tuple[nn.Module, str]:
        owner, _, leaf = name.rpartition(".")
        return self._model.get_submodule(owner), leaf

    def _held(self, name: str) -> dict[str, Tensor]:
        """The tensors that this rank holds of a weight, by part; a plain weight is one part without a name."""
        module, leaf = self._place(name)
        attributes = packed.parts_of(module, leaf) if leaf in packed.packed_weights(module) else {"": leaf}
        parameters = {part: getattr(module, attribute) for part, attribute in attributes.items()}
        return {part: (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()
                for part, parameter in parameters.items()}

    def _write(self, name: str, parts: dict[str, Tensor]) -> None:
        for part, held in self._held(name).items():
            held.copy_(parts[part])


def _patched_on_use(model: nn.Module) -> dict[str, PatchedOnUse]:
    """What takes the patches of weights that are not changed themselves, by the names of these weights."""
    return {f"{path}.{leaf}" if path else leaf: maker
            for path, module in model.named_modules() for leaf in packed.packed_weights(module)
            if isinstance(maker := packed.maker_of(module, leaf), PatchedOnUse)}
