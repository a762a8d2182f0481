"""The mode of PyTorch in which a model is made, moved, patched and run: one for all of it, chosen here.

A weight that was made in inference mode and is moved outside of it (`Module.to` puts what it moves into the same
parameter) is spoilt for good: it looks like any other tensor but has no version counter, and the first view of it
raises "Inference tensors do not track version counter". Nothing of this is seen on a CPU, where nothing moves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from .recipe import WHOLE

Method = TypeVar("Method", bound=Callable[..., Any])


@contextmanager
def mode_of(sharding: str) -> Iterator[None]:
    """Within it weights that are kept this way may be touched, whatever the mode around it.

    Whole ones in inference mode, as ComfyUI does all that it does: its quantised tensors can only be used in the mode
    that they were made in. Split ones outside of it and without gradients: not every version of FSDP2 can be used in
    inference mode.
    """
    # In this order: to leave inference mode turns gradients on.
    with torch.inference_mode(sharding == WHOLE), torch.no_grad():
        yield


def in_own_mode(method: Method) -> Method:
    """A method of a patcher that touches weights, done in the mode of its `sharding`: ComfyUI makes room for one model
    by moving others, whatever mode the first is in."""
    @functools.wraps(method)
    def inner(self: Any, *args: Any, **kwargs: Any) -> Any:
        with mode_of(self.sharding):
            return method(self, *args, **kwargs)

    return inner  # type: ignore[return-value]
