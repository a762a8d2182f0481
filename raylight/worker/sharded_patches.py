"""Patches (LoRA and its kin) on sharded weights: each rank patches its own rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from comfy.weight_adapter import LoHaAdapter, LoRAAdapter
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from raylight.host.gguf import PatchedOnUse
from raylight.host.patcher_state import DIFFUSION_MODEL
from raylight.parallel.heartbeat import cancellation_point
from raylight.sharding.rows import RowSplit, gather_rows
from raylight.sharding.subclass_weights import (
    Components,
    component_attributes,
    flattened_names,
    rebuild_weight,
    rebuilder_of,
    stored_components,
)

# ComfyUI's form of one patch: strength, what it adds, strength of the model, (dim, start, length) or None, a function.
Patch = tuple[float, Any, float, tuple[int, int, int] | None, Any]


def restrict_to_rows(patches: list[Patch], rows: slice, height: int) -> list[Patch] | None:
    """Return the patches of a weight (height, ...) that give, applied to its rows `rows` alone, these rows patched.

    A LoRA's update is a product, of which rows `rows` need the same rows of the left factor only (Hu et al., 2021,
    "LoRA"), and likewise for the two products of LoHa (Hyeon-Woo et al., 2021, "FedPara"). None if a patch needs the
    full weight, as DoRA's norm, LoKr's Kronecker product or OFT's rotation do, also one of a region that has none of
    `rows`: the full weight is gathered by all ranks or none, so the answer is the same for all `rows`.
    """
    result = []
    for strength, value, strength_model, region, function in patches:
        start, stop, first, cut_height = rows.start, rows.stop, 0, height
        if region is not None and region[0] == 0:
            _, first, cut_height = region
            start = max(start, first)
            stop = max(start, min(stop, first + cut_height))
            region = (0, start - rows.start, stop - start)
        value = None if function is not None else _cut(value, slice(start - first, stop - first), cut_height)
        if value is None:
            return None
        if start < stop:
            result.append((strength, value, strength_model, region, None))
    return result


def _cut(value: Any, rows: slice, height: int) -> Any:
    if isinstance(value, LoRAAdapter):
        up, down, alpha, mid, dora_scale, reshape = value.weights
        if any(special is not None for special in (mid, dora_scale, reshape)) or up.shape[0] != height:
            return None
        return LoRAAdapter(value.loaded_keys, (up[rows], down, alpha, mid, dora_scale, reshape))
    if isinstance(value, LoHaAdapter):
        w1a, w1b, alpha, w2a, w2b, t1, t2, dora_scale = value.weights
        if any(special is not None for special in (t1, t2, dora_scale)) or w1a.shape[0] != height:
            return None
        return LoHaAdapter(value.loaded_keys, (w1a[rows], w1b, alpha, w2a[rows], w2b, t1, t2, dora_scale))
    if isinstance(value, tuple) and value[0] in ("diff", "set") and len(value[1]) == 1:
        full = value[1][0]
        return (value[0], (full[rows],)) if isinstance(full, Tensor) and full.shape[0] == height else None
    return None


# Rounding of these does not depend on other rows; ComfyUI rounds others with noise over the full weight.
_ROUNDED_BY_ROW = (torch.float32, torch.float16, torch.bfloat16)


class ShardPatches:
    """The patches on one sharded model, and what its shards were before."""

    def __init__(
        self,
        model: nn.Module,
        mesh: DeviceMesh,
        split: RowSplit,
        device: torch.device,
        dtype: torch.dtype,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`dtype` is that in which patches are computed, on `device`. `on_change` is called when weights may change."""
        self._model = model
        self._mesh, self._split = mesh, split
        self._device = device
        self._dtype = dtype
        self._on_change = on_change
        self._on_use = _patched_on_use(model)
        self._before: dict[str, Components] = {}
        self._version: Any = None

    def apply(self, patches: Mapping[str, list[Patch]], version: Any) -> None:
        """Let the weights be those of the file with `patches` (of ComfyUI's patcher) and no others. Collective.

        Does nothing when `version` is that of the last call.

        Raises ValueError: for a patch that would change the shape of a weight; the message names the weight.
        """
        if self._version == version:
            return
        self._version = None
        self._on_change()
        wanted = {
            key.removeprefix(DIFFUSION_MODEL): value
            for key, value in patches.items()
            if key.startswith(DIFFUSION_MODEL)
        }
        for name, weight in self._on_use.items():
            weight.patches = [(wanted.pop(name), DIFFUSION_MODEL + name)] if name in wanted else []
        for name in [name for name in self._before if name not in wanted]:
            self._write(name, self._before.pop(name))
        for name, of_weight in wanted.items():
            cancellation_point()
            if name not in self._before:
                self._before[name] = {key: local.cpu().clone() for key, local in self._local(name).items()}
            self._write(name, self._patched(name, of_weight))
        self._version = version

    def revert(self) -> None:
        """Let weights that have memory be those of the file; others are read from there. `apply` will patch all."""
        self._on_change()
        for name, before in self._before.items():
            for key, local in self._local(name).items():
                if local.untyped_storage().nbytes():
                    local.copy_(before[key])
        self._before.clear()
        self._version = None

    def _patched(self, name: str, patches: list[Patch]) -> Components:
        """Return this rank's shards of a patched weight, by component."""
        module, leaf = self._module_of(name)
        if leaf in flattened_names(module):
            return self._patched_components(name, module, leaf, patches)
        parameter, before = self._model.get_parameter(name), self._before[name][""]
        if comfy.lora.calculate_shape(patches, parameter, name) != parameter.shape:
            raise ValueError(f"the LoRA changes the shape of {name}, which a split weight cannot: switch FSDP off")
        if not isinstance(parameter, DTensor):
            return {"": self._calculated(name, before, patches)}
        rows = self._rows(parameter)
        by_row = restrict_to_rows(patches, rows, parameter.shape[0]) if parameter.dtype in _ROUNDED_BY_ROW else None
        if by_row is not None:
            return {"": self._calculated(name, before, by_row)}
        return {"": self._calculated(name, self._full(before, parameter), patches)[rows]}

    def _calculated(self, name: str, weight: Tensor, patches: list[Patch]) -> Tensor:
        """Return `weight` patched, in its own shape and dtype."""
        start = comfy.model_management.cast_to_device(weight, self._device, self._dtype, copy=True)
        key = DIFFUSION_MODEL + name
        out = comfy.lora.calculate_weight(patches, start, key)
        return comfy.float.stochastic_rounding(out, weight.dtype, seed=comfy.utils.string_to_seed(key))

    def _patched_components(self, name: str, module: nn.Module, leaf: str, patches: list[Patch]) -> Components:
        """`_patched` for a flattened weight: rebuilt in full, patched and quantised again by its layer's functions."""
        parameters = {key: getattr(module, attribute) for key, attribute in component_attributes(module, leaf).items()}
        before = {key: self._full(self._before[name][key], parameter) for key, parameter in parameters.items()}
        full = rebuild_weight(module, leaf, before)
        key = DIFFUSION_MODEL + name
        # The layer itself has no full weight.
        layer = SimpleNamespace(**{leaf: full}, layout_type=getattr(module, "layout_type", None))
        start = comfy.model_management.cast_to_device(full, self._device, self._dtype, copy=True)
        start = getattr(type(module), f"convert_{leaf}")(layer, start, inplace=True)
        out = comfy.lora.calculate_weight(patches, start, key)
        out = getattr(type(module), f"set_{leaf}")(layer, out, seed=comfy.utils.string_to_seed(key), return_weight=True)
        components = stored_components(out)
        if any(components[key].shape != parameter.shape for key, parameter in parameters.items()):
            raise ValueError(
                f"the LoRA changes the quantisation of {name}, which a split weight cannot: switch FSDP off"
            )
        return {key: components[key][self._rows(parameter)] for key, parameter in parameters.items()}

    def _rows(self, parameter: Tensor) -> Any:
        """Return the index of this rank's rows: all of a parameter that is not sharded."""
        if not isinstance(parameter, DTensor):
            return ...
        return self._split.own(parameter.shape[0])

    def _full(self, local: Tensor, parameter: Tensor) -> Tensor:
        """Return the full tensor, on the device, of which `local` is this rank's shard, if `parameter` is sharded."""
        local = local.to(self._device)
        if not isinstance(parameter, DTensor):
            return local
        return gather_rows(local, parameter.shape[0], self._split, self._mesh)

    def _module_of(self, name: str) -> tuple[nn.Module, str]:
        owner, _, leaf = name.rpartition(".")
        return self._model.get_submodule(owner), leaf

    def _local(self, name: str) -> Components:
        """Return what this rank stores of a weight, by component; a plain weight is one component named ""."""
        module, leaf = self._module_of(name)
        attributes = component_attributes(module, leaf) if leaf in flattened_names(module) else {"": leaf}
        parameters = {key: getattr(module, attribute) for key, attribute in attributes.items()}
        return {
            key: (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()
            for key, parameter in parameters.items()
        }

    def _write(self, name: str, components: Components) -> None:
        for key, local in self._local(name).items():
            local.copy_(components[key])


def _patched_on_use(model: nn.Module) -> dict[str, PatchedOnUse]:
    """Return what takes the patches of weights that do not change themselves, by the names of these weights."""
    return {
        f"{path}.{leaf}".lstrip("."): rebuilder
        for path, module in model.named_modules()
        for leaf in flattened_names(module)
        if isinstance(rebuilder := rebuilder_of(module, leaf), PatchedOnUse)
    }
