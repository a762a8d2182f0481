"""Code of nodes inside a model: check that it works on each token by itself, and undo what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from raylight.host.patcher_state import HOOKS, OF_LOADING, OF_TORCH, SIMPLE

_TOKENS = 8
_TOLERANCE = 0.05
"""Of the largest value. Kernels differ by a hundredth in half precision, code that uses other tokens by much more."""


class TokenProbe:
    """Hooks on one module that repeat its first call while `is_split()`, with a few of its tokens only.

    The call raises ValueError: when the outputs for these tokens differ, so that the module uses other tokens.
    """

    def __init__(self, path: str, module: nn.Module, is_split: Callable[[], bool]) -> None:
        self._path, self._is_split = path, is_split
        self._few: Tensor | None = None
        self._handles = (
            module.register_forward_pre_hook(self._before),
            module.register_forward_hook(self._after, with_kwargs=True),
        )

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _before(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        # A copy, as the module may write into its argument.
        if (
            self._is_split()
            and args
            and isinstance(args[0], Tensor)
            and args[0].ndim == 3
            and args[0].shape[1] > _TOKENS
        ):
            self._few = args[0][:, :_TOKENS].clone()

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._is_split():
            return
        few, self._few = self._few, None  # (B, few, C)
        self.remove()
        if (
            few is None
            or not isinstance(output, Tensor)
            or output.shape[:2] != args[0].shape[:2]
            or any(isinstance(value, Tensor) for value in (*args[1:], *kwargs.values()))
        ):
            return
        alone = module.forward(few, *args[1:], **kwargs)
        difference = (alone - output[:, :_TOKENS]).abs().max()
        if not difference <= _TOLERANCE * alone.abs().max():
            raise ValueError(
                f"a node has changed {self._path} of the model, which does not work on each token by "
                f"itself any more, and here tokens are split over workers: remove the node, or use "
                f"cfg_degree, dp_degree or GPU = 1 instead"
            )


_NOTHING = object()
_CONSTANTS = (*SIMPLE, torch.dtype, torch.device)


class ModelSnapshot:
    """The attributes and hooks of a model's modules before code of nodes runs in it."""

    def __init__(self, patcher: ModelPatcher) -> None:
        """Read them, without the object patches that ComfyUI has applied for an earlier run."""
        patcher.unpatch_model(unpatch_weights=False)
        model = patcher.model.diffusion_model
        self._patcher = patcher
        self._kept = [
            (path, module, type(module), _attributes(module), {kind: set(vars(module)[kind]) for kind in HOOKS})
            for path, module in model.named_modules()
        ]
        self._left: dict[str, Any] | None = None

    def restore(self) -> None:
        """Remove what was added since, and restore what was there."""
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

    def find_state(self) -> str:
        """Return the path of an attribute in which code keeps state between forwards, "" if there is none: a container,
        or a value that changes with each forward. To be called after each forward.
        """
        left = {
            f"{path}.{name}".lstrip("."): value
            for path, module, _, attributes, _ in self._kept
            for name, value in _attributes(module).items()
            if attributes.get(name, _NOTHING) is not value
        }
        before, self._left = self._left, left
        return next(
            (
                path
                for path, value in left.items()
                if _is_state(value) or (before is not None and _differs(before.get(path, _NOTHING), value))
            ),
            "",
        )


@contextmanager
def restored_after(patcher: ModelPatcher) -> Iterator[None]:
    """Undo, at the end, what code has left on the patcher's model within it."""
    snapshot = ModelSnapshot(patcher)
    try:
        yield
    finally:
        snapshot.restore()


def _attributes(module: nn.Module) -> Mapping[str, Any]:
    return {
        name: value for name, value in vars(module).items() if name not in OF_TORCH and not name.startswith(OF_LOADING)
    }


def _is_state(value: Any) -> bool:
    return not callable(value) and not isinstance(value, (*_CONSTANTS, Tensor, tuple))


def _differs(before: Any, value: Any) -> bool:
    if isinstance(value, _CONSTANTS):
        return type(before) is not type(value) or before != value
    return isinstance(value, Tensor) and before is not value
