"""Which patches (LoRA and its kin) fit the weights that they are for.

ComfyUI finds out when it changes a weight: most patches that do not fit it leaves out, with an error in its log for
each, and at some it ends the run. Here its own calculation is tried before, on tensors without memory, so that a person
is told once and a run that would end is refused before it begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.weight_adapter
import torch
from torch import Tensor

from .telling import held_back

_META = torch.device("meta")
# ComfyUI's patches that are no adapters, of which a LoRA file can have these.
_PLAIN = ("diff", "set")

Part = tuple[int, int, int] | None  # of a weight: dimension, start, length


class Fitting:
    """The weights of one model, on which patches are tried in their order: some change a weight's shape."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = dict(shapes)
        self._tried: dict[Any, tuple[bool, tuple[int, ...]]] = {}  # most layers of a model are alike

    def shape(self, key: str) -> tuple[int, ...]:
        """A weight's shape after the patches so far."""
        return self._shapes[key]

    def __contains__(self, key: str) -> bool:
        return key in self._shapes

    def fits(self, key: str, value: Any, part: Part = None, function: Any = None) -> bool:
        """Whether ComfyUI applies a patch to the weight `key`, or to a part of it. What only the real weight can tell
        is taken to fit.

        Raises ValueError where ComfyUI would end the run.
        """
        patch = _weightless(value)
        if patch is None:
            return True
        case = (_outline(patch), self._shapes[key], part, function)
        if case not in self._tried:
            self._tried[case] = _try(patch, key, *case[1:])
        fits, self._shapes[key] = self._tried[case]
        return fits

    def nothing(self, key: str, part: Part = None) -> Any:
        """A patch for the place of one that does not fit: ComfyUI rounds a quantised weight anew where there is any."""
        shape = list(self.shape(key))
        if part is not None:
            shape[part[0]] = part[2]
        return "diff", (torch.zeros(()).expand(shape),)


def _try(patch: Any, key: str, shape: tuple[int, ...], part: Part, function: Any) -> tuple[bool, tuple[int, ...]]:
    """Whether ComfyUI applies a patch of weightless tensors to a weight of this shape, and the shape then."""
    with torch.inference_mode(False), torch.no_grad(), held_back("") as told:
        before = torch.empty(shape, device=_META)
        version = before._version
        try:
            after = comfy.lora.calculate_weight([(1.0, patch, 1.0, part, function)], before, key)
        except Exception as error:  # whatever its adapters make of such a patch
            if _is_about_meta(str(error)):
                return True, shape
            raise ValueError(f"what it has for {key} cannot be put on a weight of {in_words(shape)}: "
                             f"{error}") from error
    # A weight that was changed in place counts its changes.
    fits = after is not before or after._version > version or any(map(_is_about_meta, told))
    return fits, tuple(after.shape)


def in_words(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _weightless(value: Any) -> Any:
    """The same patch with tensors that have no memory; None where it is of a kind that cannot be tried so."""
    if type(value) in comfy.weight_adapter.adapters:
        weights = [_on_meta(weight) for weight in value.weights]
        if value.name in ("oft", "boft") and isinstance(weights[2], (int, float)):
            weights[2] = 0.0  # the limit of a rotation, with which numbers are compared
        return type(value)(value.loaded_keys, tuple(weights))
    if isinstance(value, tuple) and len(value) == 2 and value[0] in _PLAIN:
        return value[0], tuple(_on_meta(one) for one in value[1])
    return None


def _outline(patch: Any) -> Any:
    """What of a weightless patch decides whether it fits."""
    kind, parts = (patch[0], patch[1]) if isinstance(patch, tuple) else (type(patch), patch.weights)
    return kind, tuple((tuple(one.shape), one.dtype) if isinstance(one, Tensor) else
                       type(one) if isinstance(one, float) else repr(one) for one in parts)


def _on_meta(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype, device=_META) if isinstance(value, Tensor) else value


def _is_about_meta(text: str) -> bool:
    """Whether an error comes of the trial, and not of what is tried."""
    return "meta tensor" in text or "'Meta'" in text or "Meta backend" in text
