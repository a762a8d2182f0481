"""Conditioning that stays on the GPU between the steps of a run.

ComfyUI keeps most of it in system memory and sends it in each step, before the forward. From pageable memory CUDA does
that only when the GPU has done all that came before. So the host could not prepare a step during the one before it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from comfy import conds as comfy_conds
from comfy.patcher_extension import WrappersMP, get_all_wrappers
from torch import Tensor

Options = dict[str, Any]

_LARGEST_BYTES = 256 << 20  # of a step


@dataclass(slots=True)
class _Resident:
    """A conditioning whose content is on the GPU. `before` is that content, `versions` PyTorch's counts of writes to
    it, None where it has none.
    """

    moved: Any
    before: list[Tensor]
    versions: list[int | None]


class ResidentConds:
    """A wrapper of ComfyUI's CALC_COND_BATCH for one run, the innermost: conditioning becomes copies on `device`.

    Nodes see what they see in ComfyUI: those around it, and those within, for which it does nothing. What they replace
    or write to is copied anew. Copies go with what they are of, so those of conditioning for one step do not add up.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: WeakKeyDictionary[Any, _Resident] = WeakKeyDictionary()

    def __call__(
        self, executor: Callable[..., Any], model: Any, conds: list[Any], x: Tensor, timestep: Tensor, options: Options
    ) -> Any:
        if not _has_code_within(options):
            conds = self._moved(conds)
        return executor(model, conds, x, timestep, options)

    def _moved(self, conds: list[Any]) -> list[Any]:
        every = [cond for of in conds for one in of or [] for cond in (one.get("model_conds") or {}).values()]
        # ComfyUI puts conditioning of one device alone into a batch, so all of it goes or none.
        if sum(tensor.nbytes for cond in every for tensor in _tensors(cond)) > _LARGEST_BYTES:
            return conds
        return [self._all(of) for of in conds]

    def _all(self, conds: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        if conds is None:
            return None
        return [
            {**one, "model_conds": {name: self._one(value) for name, value in one["model_conds"].items()}}
            if one.get("model_conds")
            else one
            for one in conds
        ]

    def _one(self, cond: Any) -> Any:
        tensors = _tensors(cond)
        if not any(is_elsewhere(tensor, self._device) for tensor in tensors):
            return cond
        known = self._known.get(cond)
        if known is None or not _is_as_before(known, tensors):
            known = self._known[cond] = self._copied(cond, tensors)
        return known.moved

    def _copied(self, cond: Any, tensors: list[Tensor]) -> _Resident:
        moved = copy.copy(cond)
        parts = [tensor.to(self._device, copy=True) for tensor in tensors]
        moved.cond = parts[0] if isinstance(cond.cond, Tensor) else parts
        versions = [None if tensor.is_inference() else tensor._version for tensor in tensors]
        before = [tensor.clone() if tensor.is_inference() else tensor for tensor in tensors]
        return _Resident(moved, before, versions)


def is_elsewhere(tensor: Tensor, device: torch.device) -> bool:
    """Return whether a tensor is in system memory, and a run on a GPU."""
    return tensor.device.type == "cpu" and device.type != "cpu"


def _has_code_within(options: Options) -> bool:
    """Return whether code of nodes gets conditioning on its way to the model. It may expect it where ComfyUI has it."""
    return "model_function_wrapper" in options or bool(
        get_all_wrappers(WrappersMP.APPLY_MODEL, options, is_model_options=True)
    )


def _tensors(cond: Any) -> list[Tensor]:
    """Return the tensors of a conditioning of ComfyUI's own kinds, none of another."""
    if type(cond).__module__ != comfy_conds.__name__:
        return []
    content = getattr(cond, "cond", None)
    parts = [content] if isinstance(content, Tensor) else content
    if not isinstance(parts, list) or not all(type(part) is Tensor for part in parts):
        return []
    return parts


def _is_as_before(known: _Resident, tensors: list[Tensor]) -> bool:
    """Return whether a conditioning has the content that was copied."""
    if len(tensors) != len(known.before):
        return False
    return all(
        # Writes to tensors of inference mode are not counted.
        tensor is before and tensor._version == version
        if version is not None
        else tensor.dtype == before.dtype and tensor.shape == before.shape and torch.equal(tensor, before)
        for tensor, before, version in zip(tensors, known.before, known.versions, strict=True)
    )
