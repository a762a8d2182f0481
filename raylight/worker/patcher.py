"""ComfyUI's patcher of a model on every rank, and the mode of PyTorch in which weights are touched."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import comfy.model_patcher
import torch

from raylight.host.recipe import REPLICATED
from raylight.parallel.process_group import smallest

Method = TypeVar("Method", bound=Callable[..., Any])

_moves = 0


def moves() -> int:
    """Return how often weights of any model may have been moved or changed by their patchers, or what else a captured
    graph holds: a number that only grows.
    """
    return _moves


def note_change() -> None:
    """Have graphs captured again: kernels would be chosen otherwise now."""
    global _moves
    _moves += 1


@contextmanager
def mode_of(sharding: str) -> Iterator[None]:
    """Within it weights that are kept this way may be made, moved, patched and used, whatever the mode around it.

    Replicated ones in inference mode, as ComfyUI does all that it does: its quantised tensors can only be used in the
    mode in which they were made. Sharded ones outside of it and without gradients: what is made so can be used in any
    mode.

    One mode for all of it, because a weight that was made in inference mode and is moved outside of it (`Module.to`
    puts what it moves into the same parameter) is spoilt: it has no version counter, and the first view of it raises
    "Inference tensors do not track version counter". A CPU shows nothing of this, as nothing moves there.
    """
    # In this order: to leave inference mode turns gradients on.
    with torch.inference_mode(sharding == REPLICATED), torch.no_grad():
        yield


def in_own_mode(method: Method) -> Method:
    """Run a patcher's method that touches weights in the mode of its `sharding`: ComfyUI makes room for one model by
    moving others, in whatever mode the first one is.
    """

    @functools.wraps(method)
    def inner(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _moves
        _moves += 1
        with mode_of(self.sharding), self.moving():
            return method(self, *args, **kwargs)

    return inner  # type: ignore[return-value]


class RankPatcher(comfy.model_patcher.ModelPatcher):
    """A patcher that makes the same decisions on every rank.

    `weights` is what a subclass knows of the model's weights; all clones share it. `agreed_free` is what
    `get_free_memory` is to return next, where ranks have agreed already.
    """

    sharding = REPLICATED
    weights: Any = None
    agreed_free: int | None = None

    def clone(self, *args: Any, **kwargs: Any) -> RankPatcher:
        other: Any = super().clone(*args, **kwargs)
        other.weights = self.weights
        return other

    def moving(self) -> AbstractContextManager[None]:
        """Return a context in which ComfyUI moves this patcher's weights."""
        return nullcontext()

    @property
    def kept_bytes(self) -> int:
        """How many bytes gathered weights take on this rank's device, which can be dropped at any time between runs."""
        return 0

    def release_kept(self) -> int:
        """Drop these, and return how many bytes that frees."""
        return 0

    # All that ComfyUI calls to have weights moved or patched.
    partially_load = in_own_mode(comfy.model_patcher.ModelPatcher.partially_load)
    partially_unload = in_own_mode(comfy.model_patcher.ModelPatcher.partially_unload)
    patch_model = in_own_mode(comfy.model_patcher.ModelPatcher.patch_model)
    unpatch_model = in_own_mode(comfy.model_patcher.ModelPatcher.unpatch_model)
    load = in_own_mode(comfy.model_patcher.ModelPatcher.load)
    detach = in_own_mode(comfy.model_patcher.ModelPatcher.detach)

    def own_free_memory(self, device: torch.device) -> int:
        """Return the free bytes on this rank. What gathered weights take is free: a larger forward drops them first."""
        return int(super().get_free_memory(device)) + self.kept_bytes

    def get_free_memory(self, device: torch.device) -> int:
        """Return the free bytes on the fullest rank: `agreed_free` if it is known, once, and else by a collective.

        ComfyUI batches conditionings by what is free; ranks that batched differently would meet in collectives of
        different shapes.
        """
        agreed, self.agreed_free = self.agreed_free, None
        return smallest(self.own_free_memory(device)) if agreed is None else agreed
