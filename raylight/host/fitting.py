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
        self._shapes = shapes
        self._weights: dict[str, Tensor] = {}

    def shape(self, key: str) -> tuple[int, ...]:
        """A weight's shape after the patches so far."""
        return tuple(self._weights[key].shape) if key in self._weights else self._shapes[key]

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
        with torch.inference_mode(False), torch.no_grad(), held_back("") as told:
            before = self._weights.get(key)
            if before is None:
                before = torch.empty(self._shapes[key], device=_META)
            version = before._version
            try:
                after = comfy.lora.calculate_weight([(1.0, patch, 1.0, part, function)], before, key)
            except Exception as error:  # whatever its adapters make of such a patch
                if _is_about_meta(str(error)):
                    return True
                raise ValueError(f"what it has for {key} cannot be put on a weight of {in_words(before.shape)}: "
                                 f"{error}") from error
        if any(map(_is_about_meta, told)):
            return True
        self._weights[key] = after
        return after is not before or after._version > version

    def nothing(self, key: str, part: Part = None) -> Any:
        """A patch for the place of one that does not fit: ComfyUI rounds a quantised weight anew where there is any."""
        shape = list(self.shape(key))
        if part is not None:
            shape[part[0]] = part[2]
        return "diff", (torch.zeros(()).expand(shape),)


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


def _on_meta(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype, device=_META) if isinstance(value, Tensor) else value


def _is_about_meta(text: str) -> bool:
    """Whether an error comes of the trial, and not of what is tried."""
    return "meta tensor" in text or "'Meta'" in text or "Meta backend" in text
