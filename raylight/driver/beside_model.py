"""What a model has beside its diffusion model: how it samples, the format of its latents, settings of the model itself.

Some nodes change them in place, which no patch tells of.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from raylight.cluster.serialization import as_bytes
from raylight.host.patcher_state import OF_TORCH, SIMPLE

INNER = "diffusion_model"
# What ComfyUI notes on a model about where it is and who uses it.
_NOTES = (
    "current_",
    "device",
    "dynamic_",
    "lowvram_",
    "model_loaded_",
    "model_lowvram",
    "model_offload_",
    "skip_injection",
    "_",
)


class BesideModel:
    """What a model had beside its diffusion model when it was built."""

    def __init__(self, base: BaseModel) -> None:
        self._content = {name: _content(value) for name, value in _parts(base)}

    def changed(self, patcher: ModelPatcher) -> dict[str, Any]:
        """Return, by its name, a copy of what differs on the model of a patcher, which is this one or another one of
        the same file. An object patch comes in the place of what it names, so that is left out.
        """
        patched = {name.partition(".")[0] for name in patcher.object_patches}
        before = patcher.object_patches_backup  # ComfyUI leaves patches on the model until it is used again
        patched |= {name.partition(".")[0] for name in before if "." in name}
        parts = ((name, before.get(name, value)) for name, value in _parts(patcher.model) if name not in patched)
        return {
            name: copy.deepcopy(value)
            for name, value in parts
            if name in self._content and _content(value) != self._content[name]
        }


def _parts(base: BaseModel) -> Iterator[tuple[str, Any]]:
    yield from ((name, module) for name, module in base._modules.items() if name != INNER and module is not None)
    for name, value in vars(base).items():
        if name not in OF_TORCH and not name.startswith(_NOTES) and (name == "latent_format" or _is_plain(value)):
            yield name, value


def _content(value: Any) -> Any:
    """Return what is equal for two values that compute the same. Weights are not part of it."""
    if _is_plain(value):
        return type(value), value
    if isinstance(value, Tensor):
        return value.dtype, value.shape, as_bytes(value).tobytes()
    if isinstance(value, (list, tuple)):
        return type(value), [_content(item) for item in value]
    if isinstance(value, FunctionType):  # of two objects of a class it is another one
        return value.__qualname__, value.__code__.co_filename, value.__code__.co_firstlineno
    kind, attributes = type(value), getattr(value, "__dict__", {})
    if isinstance(value, nn.Module):
        attributes = {name: one for name, one in attributes.items() if name not in OF_TORCH}
        attributes |= dict(value.named_buffers(recurse=False)) | dict(value.named_children())
    # ComfyUI makes a class for the schedule of each model.
    bases = [(one.__module__, one.__qualname__) for one in (kind, *kind.__bases__)]
    return bases, {name: _content(one) for name, one in attributes.items()}


def _is_plain(value: Any) -> bool:
    return isinstance(value, SIMPLE) or (isinstance(value, tuple) and all(map(_is_plain, value)))
