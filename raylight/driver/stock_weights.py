"""The weights of a model of ComfyUI as they are without patches, and whether they are those of a file.

Code of nodes can change a weight in place, and in the mode in which ComfyUI runs nodes PyTorch keeps no count of that.
So weights are looked at: all of a small one, of a large one an element of each row and of each column.
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

from raylight.sharding.lazy_concat import LazyConcat
from raylight.sharding.subclass_weights import flatten_tensor

DIFFUSION_MODEL = "diffusion_model."
_SMALL = 1 << 16
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def unpatched(model: ModelPatcher) -> Iterator[BaseModel]:
    """Within it, the model has its weights and objects without the patches that ComfyUI has put into them. Nothing is
    moved or copied: ComfyUI keeps what patches replace."""
    base = model.model
    with model.use_ejected():
        # Objects first, as a weight's name may lead through one of them.
        patched = {name: comfy.utils.set_attr(base, name, old) for name, old in model.object_patches_backup.items()}
        weights = {}
        for key, old in _backups(model).items():
            owner, leaf = _place(base, key)
            if owner._parameters.get(leaf) is not None:
                weights[key] = owner._parameters[leaf]
                owner._parameters[leaf] = nn.Parameter(old, requires_grad=False)
        try:
            yield base
        finally:
            for key, weight in weights.items():
                owner, leaf = _place(base, key)
                owner._parameters[leaf] = weight
            for name, value in patched.items():
                comfy.utils.set_attr(base, name, value)


def _backups(model: ModelPatcher) -> dict[str, Tensor]:
    # What hooks have replaced may have had patches already, so that the other backup counts.
    hooked = {key: weight for key, (weight, _) in model.hook_backup.items()}
    return hooked | {key: backup.weight for key, backup in model.backup.items()}


def _place(base: BaseModel, key: str) -> tuple[nn.Module, str]:
    owner, _, leaf = key.rpartition(".")
    return base.get_submodule(owner), leaf


def weights(base: BaseModel) -> dict[str, Tensor]:
    """Parameters of the diffusion model, and those of its buffers that files have, by name."""
    found: dict[str, Tensor] = {}
    for path, module in base.diffusion_model.named_modules():
        prefix = f"{path}." if path else ""
        for leaf, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None and leaf not in module._non_persistent_buffers_set:
                found[prefix + leaf] = value
    return found


def is_ggml(value: Tensor) -> bool:
    """Whether a tensor is one of a GGUF pack: bytes, with the shape of what they stand for."""
    return getattr(value, "tensor_type", None) is not None and hasattr(value, "tensor_shape")


def parts(value: Tensor) -> dict[str, Tensor]:
    """The plain tensors that a weight is stored in."""
    if isinstance(value, LazyConcat):
        return {"": value[...]}
    if is_ggml(value):
        with torch._C.DisableTorchFunctionSubclass():
            return {"": value.as_subclass(Tensor)}
    flat = flatten_tensor(value)
    return {"": value} if flat is None else flat.components


def digests(base: BaseModel) -> dict[str, bytes]:
    """What tells a weight from what it was before a change, for each."""
    found = {}
    for name, value in weights(base).items():
        digest = hashlib.blake2b(repr((value.dtype, tuple(value.shape))).encode(), digest_size=16)
        for part in parts(value).values():
            digest.update(_bytes(_some(part)))
        found[name] = digest.digest()
    return found


def weights_differ(model: ModelPatcher, base: BaseModel) -> list[str]:
    """The names of the weights of the diffusion model that are not, without patches, what ComfyUI makes of those of
    `base`, which lie in their file: others, or not there on one side."""
    theirs = weights(base)
    with unpatched(model) as stock:
        ours = weights(stock)
        return [
            name
            for name in {**ours, **theirs}
            if name not in ours or name not in theirs or not _same(ours[name], theirs[name])
        ]


def _same(ours: Tensor, theirs: Tensor) -> bool:
    left, right = parts(ours), parts(theirs)
    if tuple(ours.shape) != tuple(theirs.shape) or _quantisation(ours, left) != _quantisation(theirs, right):
        return False
    return left.keys() == right.keys() and all(_same_part(left[name], right[name]) for name in left)


def _quantisation(value: Tensor, stored: Mapping[str, Tensor]) -> Any:
    """What bytes stand for in a tensor of a GGUF pack, which has others in this class too."""
    return value.tensor_type if is_ggml(value) and stored[""].dtype == torch.uint8 else None


def _same_part(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    # As ComfyUI's loader converts a file's weights, of which the workers' model may have another dtype.
    return torch.equal(_bits(_some(ours)), _bits(_some(theirs).to(ours.dtype)))


def _some(part: Tensor) -> Tensor:
    """A flat copy, on the CPU, of all of a small tensor; of a large one at least an element of each row and column."""
    if part.numel() <= _SMALL or part.ndim < 2:
        return part.detach().cpu().reshape(-1)
    rows = part.detach().flatten(1)
    at = torch.arange(max(rows.shape), device=rows.device)
    return _bits(rows)[at % rows.shape[0], at % rows.shape[1]].cpu().view(part.dtype)


def _bits(value: Tensor) -> Tensor:
    return value.view(_BITS[value.element_size()]) if value.element_size() in _BITS else value


def _bytes(value: Tensor) -> Any:
    return memoryview(value.contiguous().view(torch.uint8).numpy())
