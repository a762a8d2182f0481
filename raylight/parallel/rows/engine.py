"""Run a function of an image by rows: each rank gives its rows to it, and has its rows of the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import convolution, group_norm, pointwise, reductions, resizing, views  # noqa: F401  each registers its rules
from .exchange import own
from .layout import Cuts, Rows
from .pointwise import mark_constant, random_like
from .row_tensor import RowGroup, RowsError, RowTensor, local_rows, plain, wrap

CONSTANTS = (torch.zeros, torch.ones, torch.full)


class Factories(TorchFunctionMode):
    """What model code makes from a shape: constants, which suit any rows, and noise, which has to be the whole's."""

    def __init__(self) -> None:
        super().__init__()
        self._noise_of: RowTensor | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn and self._noise_of is not None:
            return self._noise(args, dict(kwargs))
        result = func(*args, **kwargs)
        return mark_constant(result) if func in CONSTANTS else result

    @contextmanager
    def noise_of(self, tensor: RowTensor) -> Iterator[None]:
        """Draw noise of the last two dimensions of `tensor`, (H, W), for all ranks alike within this context."""
        before, self._noise_of = self._noise_of, tensor
        try:
            yield
        finally:
            self._noise_of = before

    def _noise(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        tensor = self._noise_of
        assert tensor is not None
        shape = args[0] if len(args) == 1 else args
        if tensor.rows.dim != -2 or tuple(shape) != tuple(tensor.shape[-2:]):
            raise RowsError(f"noise of shape {tuple(shape)} for a tensor {tuple(tensor.shape)}")
        like = plain(tensor)[(0,) * (tensor.ndim - 2)]
        return random_like(torch.randn_like, (wrap(like, tensor.rows, tensor.ranks),), kwargs)


def shared(full: Tensor, cuts: Cuts, ranks: RowGroup) -> RowTensor:
    """Return this rank's rows of an image that every rank has in full: (..., H, W) -> (..., local, W)."""
    start, stop = cuts.spans[ranks.rank]
    return wrap(full.narrow(-2, start, stop - start), Rows(-2, cuts), ranks)


def finished(result: Any) -> tuple[Tensor, Cuts]:
    """Return this rank's rows of a result, (..., local, W), as an ordinary tensor, and how its rows are cut.

    Raises RowsError: the rows of the result are not its height.
    """
    if not isinstance(result, RowTensor) or result.rows.dim != -2 or result.rows.outer > 1:
        raise RowsError("the result is not an image whose rows are known")
    result = own(result)
    assert local_rows(result) == result.shape[-2]
    return plain(result), result.rows.cuts
