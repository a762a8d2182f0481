"""The weights of a model of ComfyUI without their patches, and whether they are those of a file.

Nodes' code can change a weight in place, which PyTorch does not count in the inference mode in which ComfyUI runs
nodes. So contents are compared: all of a small weight; of a large one an element of each weight row and column.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy.utils
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from raylight.cluster.serialization import as_bytes
from raylight.sharding.lazy_concat import LazyConcat
from raylight.sharding.subclass_weights import flatten_tensor

_SMALL = 1 << 16
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def unpatched(model: ModelPatcher) -> Iterator[BaseModel]:
    """Undo the patches that ComfyUI has applied to the model's weights and objects, for a while. Nothing is moved or
    copied: ComfyUI keeps what patches replace.
    """
    base = model.model
    with model.use_ejected():
        # Objects first, as one of them may contain a patched weight.
        patched = {name: comfy.utils.set_attr(base, name, old) for name, old in model.object_patches_backup.items()}
        weights = {}
        for key, old in _backups(model).items():
            owner, leaf = _owner_of(base, key)
            if owner._parameters.get(leaf) is not None:
                weights[key] = owner._parameters[leaf]
                owner._parameters[leaf] = nn.Parameter(old, requires_grad=False)
        try:
            yield base
        finally:
            for key, weight in weights.items():
                owner, leaf = _owner_of(base, key)
                owner._parameters[leaf] = weight
            for name, value in patched.items():
                comfy.utils.set_attr(base, name, value)


def _backups(model: ModelPatcher) -> dict[str, Tensor]:
    # A weight that hooks replaced may have been patched before, so the other backup is the older one.
    hooked = {key: weight for key, (weight, _) in model.hook_backup.items()}
    return hooked | {key: backup.weight for key, backup in model.backup.items()}


def _owner_of(base: BaseModel, key: str) -> tuple[nn.Module, str]:
    owner, _, leaf = key.rpartition(".")
    return base.get_submodule(owner), leaf


def weights(base: BaseModel) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of the diffusion model by name."""
    return weights_within(base.diffusion_model)


def weights_within(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of a model and its modules by name."""
    return {
        f"{path}.{leaf}" if path else leaf: value
        for path, module in model.named_modules()
        for leaf, value in weights_of(module).items()
    }


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own parameters and persistent buffers, those that files have, by name."""
    return {
        leaf: value
        for leaf, value in (*module._parameters.items(), *module._buffers.items())
        if value is not None and leaf not in module._non_persistent_buffers_set
    }


def is_ggml(value: Tensor) -> bool:
    """Return whether a tensor is one of a GGUF pack: quantised bytes, and the shape of the weight that they encode."""
    return getattr(value, "tensor_type", None) is not None and hasattr(value, "tensor_shape")


def plain_tensors(value: Tensor) -> dict[str, Tensor]:
    """Return the plain tensors that a weight is stored in, by name."""
    if isinstance(value, LazyConcat):
        return {"": value[...]}
    if is_ggml(value):
        with torch._C.DisableTorchFunctionSubclass():
            return {"": value.as_subclass(Tensor)}
    flat = flatten_tensor(value)
    return {"": value} if flat is None else flat.components


def digests(base: BaseModel) -> dict[str, bytes]:
    """Return a digest of each weight, to find changes."""
    return digests_of(weights(base))


def digests_of(values: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Return a digest of each of these weights."""
    found = {}
    for name, value in values.items():
        digest = hashlib.blake2b(repr((value.dtype, tuple(value.shape))).encode(), digest_size=16)
        for tensor in plain_tensors(value).values():
            digest.update(as_bytes(_sample(tensor)).data)
        found[name] = digest.digest()
    return found


def weights_differ(model: ModelPatcher, base: BaseModel) -> list[str]:
    """Return the names of weights of the diffusion model that differ, without patches, from what ComfyUI makes of those
    of `base`, which are still in their file; also of weights that only one of the two has.
    """
    theirs = weights(base)
    with unpatched(model) as stock:
        return differing(weights(stock), theirs)


def differing(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """Return the names of weights that differ from what ComfyUI makes of `theirs`, or that only one of the two has."""
    return [name for name in {**ours, **theirs} if not _same(ours.get(name), theirs.get(name))]


def _same(ours: Tensor | None, theirs: Tensor | None) -> bool:
    if ours is None or theirs is None:
        return False
    left, right = plain_tensors(ours), plain_tensors(theirs)
    if tuple(ours.shape) != tuple(theirs.shape) or _quantisation(ours, left) != _quantisation(theirs, right):
        return False
    return left.keys() == right.keys() and all(_same_content(left[name], right[name]) for name in left)


def _quantisation(value: Any, stored: Mapping[str, Tensor]) -> Any:
    """Return the quantisation of a tensor of a GGUF pack, which keeps plain tensors in this class too."""
    return value.tensor_type if is_ggml(value) and stored[""].dtype == torch.uint8 else None


def _same_content(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    # ComfyUI's loader converts a file's weights, so the workers' model may have another dtype.
    return torch.equal(_bits(_sample(ours)), _bits(_sample(theirs).to(ours.dtype)))


def _sample(tensor: Tensor) -> Tensor:
    """Return a small tensor flat on the CPU, (N,); of a large one at least an element of each row and column."""
    if tensor.numel() <= _SMALL or tensor.ndim < 2:
        return tensor.detach().cpu().reshape(-1)
    rows = tensor.detach().flatten(1)
    at = torch.arange(max(rows.shape), device=rows.device)
    return _bits(rows)[at % rows.shape[0], at % rows.shape[1]].cpu().view(tensor.dtype)


def _bits(value: Tensor) -> Tensor:
    return value.view(_BITS[value.element_size()]) if value.element_size() in _BITS else value
