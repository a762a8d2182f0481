"""The part of a weight's patches that concerns some of its rows."""

from __future__ import annotations

from collections.abc import Mapping
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
from raylight.parallel.heartbeat import cancellation_point
from raylight.sharding import subclass_weights
from raylight.sharding.rows import gather_rows, rows_of

# ComfyUI's form of one patch: strength, what it adds, strength of the model, (dim, start, length) or None, a function.
Patch = tuple[float, Any, float, tuple[int, int, int] | None, Any]


def restrict_to_rows(patches: list[Patch], rows: slice, height: int) -> list[Patch] | None:
    """The patches for rows `rows` of a weight that has `height`, to be applied to these rows alone.

    A LoRA's update is a product, of which rows `rows` need the same rows of the left factor only (Hu et al., 2021,
    "LoRA"), and likewise for the two products of LoHa (Hyeon-Woo et al., 2021, "FedPara"). None where a patch looks at
    the whole weight, as DoRA's norm, LoKr's Kronecker product or OFT's rotation do.
    """
    result = []
    for strength, value, strength_model, part, function in patches:
        if function is not None:
            return None
        start, stop, cut_height = rows.start, rows.stop, height
        if part is not None and part[0] == 0:
            start, stop = max(rows.start, part[1]), min(rows.stop, part[1] + part[2])
            if start >= stop:
                continue
            cut = slice(start - part[1], stop - part[1])
            cut_height, part = part[2], (0, start - rows.start, stop - start)
        else:
            cut = slice(start, stop)
        value = _cut(value, cut, cut_height)
        if value is None:
            return None
        result.append((strength, value, strength_model, part, None))
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
        whole = value[1][0]
        return (value[0], (whole[rows],)) if isinstance(whole, Tensor) and whole.shape[0] == height else None
    return None


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
            cancellation_point()
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
        if leaf in subclass_weights.packed_weights(module):
            return self._patched_packed(name, module, leaf, patches)
        parameter = self._model.get_parameter(name)
        if comfy.lora.calculate_shape(patches, parameter, name) != parameter.shape:
            raise ValueError(f"the LoRA changes the shape of {name}, which a split weight cannot: switch FSDP off")
        if not isinstance(parameter, DTensor):
            return {"": self._calculated(name, before[""], patches)}
        rows = rows_of(parameter.shape[0], self._mesh.size(), self._mesh.get_local_rank())
        by_row = restrict_to_rows(patches, rows, parameter.shape[0]) if parameter.dtype in _ROUNDED_BY_ROW else None
        if by_row is not None:
            return {"": self._calculated(name, before[""], by_row)}
        return {"": self._calculated(name, self._gathered(before[""], parameter), patches)[rows]}

    def _calculated(self, name: str, weight: Tensor, patches: list[Patch]) -> Tensor:
        start = comfy.model_management.cast_to_device(weight, self._device, self._dtype, copy=True)
        key = PREFIX + name
        out = comfy.lora.calculate_weight(patches, start, key)
        return comfy.float.stochastic_rounding(out, weight.dtype, seed=comfy.utils.string_to_seed(key))

    def _patched_packed(self, name: str, module: nn.Module, leaf: str, patches: list[Patch]) -> dict[str, Tensor]:
        attributes = subclass_weights.parts_of(module, leaf)
        before = self._before[name]
        parameters = {part: getattr(module, attribute) for part, attribute in attributes.items()}
        whole = subclass_weights.unflatten(
            module,
            leaf,
            {
                part: self._gathered(before[part], parameter)
                if isinstance(parameter, DTensor)
                else before[part].to(self._device)
                for part, parameter in parameters.items()
            },
        )
        key = PREFIX + name
        # Its own functions for this, on a stand-in: the layer itself has no whole weight.
        layer = SimpleNamespace(**{leaf: whole}, layout_type=getattr(module, "layout_type", None))
        start = comfy.model_management.cast_to_device(whole, self._device, self._dtype, copy=True)
        start = getattr(type(module), f"convert_{leaf}")(layer, start, inplace=True)
        out = comfy.lora.calculate_weight(patches, start, key)
        out = getattr(type(module), f"set_{leaf}")(layer, out, seed=comfy.utils.string_to_seed(key), return_weight=True)
        made = subclass_weights.parts_as_held(out)
        result = {}
        for part, parameter in parameters.items():
            if made[part].shape != parameter.shape:
                raise ValueError(
                    f"the LoRA changes the quantisation of {name}, which a split weight cannot: switch FSDP off"
                )
            rows = (
                rows_of(parameter.shape[0], self._mesh.size(), self._mesh.get_local_rank())
                if isinstance(parameter, DTensor)
                else ...
            )
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
        attributes = (
            subclass_weights.parts_of(module, leaf) if leaf in subclass_weights.packed_weights(module) else {"": leaf}
        )
        parameters = {part: getattr(module, attribute) for part, attribute in attributes.items()}
        return {
            part: (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()
            for part, parameter in parameters.items()
        }

    def _write(self, name: str, parts: dict[str, Tensor]) -> None:
        for part, held in self._held(name).items():
            held.copy_(parts[part])


def _patched_on_use(model: nn.Module) -> dict[str, PatchedOnUse]:
    """What takes the patches of weights that are not changed themselves, by the names of these weights."""
    return {
        f"{path}.{leaf}" if path else leaf: maker
        for path, module in model.named_modules()
        for leaf in subclass_weights.packed_weights(module)
        if isinstance(maker := subclass_weights.maker_of(module, leaf), PatchedOnUse)
    }
