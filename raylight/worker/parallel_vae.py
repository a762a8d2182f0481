"""Split a VAE by image rows over the ranks of a group: decode and encode then give each rank its rows of the result."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from raylight.parallel.rows.layout import Cuts, cut
from raylight.plans.vae_rows import rule_for, why_not

__all__ = ["RowParallel", "apply_row_parallel", "why_not"]

# A reshape tells a dimension of rows from one of size 1 by its size, so each rank keeps two latent rows at least.
LEAST_LATENT_ROWS = 2

log = logging.getLogger(__name__)


def apply_row_parallel(first_stage_model: nn.Module, group: dist.ProcessGroup) -> RowParallel:
    """Make `first_stage_model.decode` and `.encode` compute a share of the rows on each rank of `group`.

    Both then take the full tensor, (B, C, H, W) or (B, C, T, H, W), the same on every rank, and return the rows of the
    result that `RowParallel.rows` names. They are collective: all ranks call them alike.

    Raises ValueError: the class cannot be split by rows; the message says why.
    """
    return RowParallel(first_stage_model, group)


class RowParallel:
    """A VAE that is split by rows. `remove` ends it.

    `halo_bytes` counts what this rank has received from others since `apply_row_parallel`.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup) -> None:
        self._rule = rule_for(model)
        self._model = model
        self._group = group
        self._ranks, self._rank = dist.get_world_size(group), dist.get_rank(group)
        self._output: Cuts | None = None
        self.halo_bytes = 0
        self._ratio = self._rule.rows_per_latent(model)
        # Attributes of the instance hide the methods of its class until `remove`.
        self._replace("decode", self._decode(model.decode))
        self._replace("encode", self._encode(model.encode))

    def _replace(self, name: str, method: Callable[..., Any]) -> None:
        self._model.__dict__[name] = method

    def remove(self) -> None:
        """Let the VAE compute all rows again."""
        for name in ("decode", "encode"):
            self._model.__dict__.pop(name, None)

    def rows(self, total: int) -> tuple[int, int]:
        """Return the rows (start, stop) of the last result that this rank has, of `total` on all ranks.

        Raises RuntimeError: the last result had another height, or there is none yet.
        """
        if self._output is None or self._output.total != total:
            have = "there is no result yet" if self._output is None else f"the last result has {self._output.total}"
            raise RuntimeError(f"rows of a result of {total} rows were asked for, but {have}")
        return self._output.spans[self._rank]

    def _decode(self, decode: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def decode_rows(z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self._own_rows(decode(z, *args, **kwargs), z.shape[-2])

        return decode_rows

    def _encode(self, encode: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def encode_rows(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            latent = encode(x, *args, **kwargs)
            return self._own_rows(latent, latent.shape[-2])

        return encode_rows

    def _own_rows(self, full: Tensor, latent_rows: int) -> Tensor:
        """Return this rank's rows of a result that every rank has in full."""
        self._output = cut(full.shape[-2], self._ranks, full.shape[-2] // latent_rows)
        start, stop = self._output.spans[self._rank]
        return full.narrow(-2, start, stop - start)
