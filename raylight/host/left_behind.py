"""What code of nodes leaves on a worker's model: attributes of its modules, classes and hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from .changes import HOOKS, OF_LOADING, OF_TORCH, SIMPLE

_NOTHING = object()


class AsBefore:
    """A model before code of nodes runs in it."""

    def __init__(self, patcher: ModelPatcher) -> None:
        """Takes back what ComfyUI has put on the patcher's model for the run before, which would be put back else."""
        patcher.unpatch_model(unpatch_weights=False)
        model = patcher.model.diffusion_model
        self._patcher = patcher
        self._kept = [(path, module, type(module), _attributes(module), {kind: set(vars(module)[kind])
                                                                        for kind in HOOKS})
                      for path, module in model.named_modules()]
        self._left: dict[str, Any] | None = None

    def restore(self) -> None:
        """Take away what has come since, and put back what was there."""
        self._patcher.unpatch_model(unpatch_weights=False)
        for _, module, kind, attributes, hooks in self._kept:
            if type(module) is not kind:
                module.__class__ = kind
            for name in _attributes(module):
                if name not in attributes:
                    del vars(module)[name]
            vars(module).update(attributes)
            for name, keys in hooks.items():
                for key in [key for key in vars(module)[name] if key not in keys]:
                    del vars(module)[name][key]

    def state(self) -> str:
        """The path of an attribute in which code keeps what it knows from one forward to the next, "" where there is
        none. To be called after each forward: an attribute that is a container, or is another one each time."""
        left = {f"{path}.{name}".lstrip("."): value for path, module, _, attributes, _ in self._kept
                for name, value in _attributes(module).items() if attributes.get(name, _NOTHING) is not value}
        before, self._left = self._left, left
        return next((path for path, value in left.items() if _is_state(value) or (
            before is not None and _differs(before.get(path, _NOTHING), value))), "")


@contextmanager
def leaving_nothing(patcher: ModelPatcher) -> Iterator[None]:
    """Within it code may leave on the patcher's model what it likes; after it nothing is left."""
    before = AsBefore(patcher)
    try:
        yield
    finally:
        before.restore()


def _attributes(module: nn.Module) -> Mapping[str, Any]:
    return {name: value for name, value in vars(module).items()
            if name not in OF_TORCH and not name.startswith(OF_LOADING)}


def _is_state(value: Any) -> bool:
    return not callable(value) and not isinstance(value, (*SIMPLE, Tensor, tuple))


def _differs(before: Any, value: Any) -> bool:
    if isinstance(value, SIMPLE):
        return type(before) is not type(value) or before != value
    return isinstance(value, Tensor) and before is not value
