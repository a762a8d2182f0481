"""Split a VAE by image rows over the ranks of a group: decode and encode then give each rank its rows of the result."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from comfy import model_management
from torch import Tensor, nn

from raylight.host.comfy_patches import replaced
from raylight.parallel import bandwidth, shares
from raylight.parallel.process_group import smallest
from raylight.parallel.rows.engine import Factories, finished, shared
from raylight.parallel.rows.layout import Cuts, Rows, cut
from raylight.parallel.rows.row_tensor import RowGroup, followed_as_one, wrap
from raylight.plans.vae_rows import rule_for, why_not

__all__ = ["RowParallel", "apply_row_parallel", "why_not"]

# A reshape tells a dimension of rows from one of size 1 by its size, so each rank keeps two latent rows at least.
LEAST_LATENT_ROWS = 2

# On such a link, launches that hide a halo take longer than the halo, and than to copy a small picture beside it.
FAST_BYTES_PER_S = 20e9
LARGE_BYTES = 16 << 20

log = logging.getLogger(__name__)


def apply_row_parallel(first_stage_model: nn.Module, group: dist.ProcessGroup) -> RowParallel:
    """Make `first_stage_model.decode` and `.encode` compute a share of the rows on each rank of `group`.

    Both then take the full tensor, (B, C, H, W) or (B, C, T, H, W), the same on every rank, and return the rows of the
    result that `RowParallel.rows` names. They are collective: all ranks call them alike, with the same state of their
    random generators if the VAE draws noise. A picture of fewer than two latent rows a rank is computed whole by each.

    Raises ValueError: the class cannot be split by rows; the message says why.
    """
    return RowParallel(first_stage_model, group)


class RowParallel:
    """A VAE that is split by rows. `remove` ends it; `counts` is what this rank has exchanged and computed since."""

    def __init__(self, model: nn.Module, group: dist.ProcessGroup) -> None:
        rule = rule_for(model)
        self._model: Any = model
        self._ratio = rule.rows_per_latent(model)
        self._by_memory = rule.by_memory
        self._output: Cuts | None = None
        self._factories = Factories()
        self._replaced: list[tuple[nn.Module, str]] = []
        self.counts = RowGroup(
            group,
            dist.get_world_size(group),
            dist.get_rank(group),
            channels_last=rule.channels_last,
            hides_halos_from=LARGE_BYTES if bandwidth.slowest_in_use() >= FAST_BYTES_PER_S else 0,
        )
        vae: Any = model  # its methods are those of ComfyUI's VAE classes, which have no base
        self._replace(model, "decode", self._decode(vae.decode))
        self._replace(model, "encode", self._encode(vae.encode))
        if hasattr(model, "decode_output_shape"):
            self._replace(model, "decode_output_shape", self._output_shape(vae.decode_output_shape))
        for name in rule.noise:
            self._follow_noise(*name.split("."))
        for module in model.modules():
            if type(module).__name__ in rule.pointwise:
                self._replace(module, "forward", followed_as_one(module.forward))

    @property
    def halo_bytes(self) -> int:
        """The number of bytes that this rank has received from others."""
        return self.counts.received_bytes

    def rows(self, total: int) -> tuple[int, int]:
        """Return the rows (start, stop) of the last result that this rank has, of `total` on all ranks.

        Raises RuntimeError: the last result had another height, or there is none yet.
        """
        if self._output is None or self._output.total != total:
            have = "there is no result yet" if self._output is None else f"the last result has {self._output.total}"
            raise RuntimeError(f"rows of a result of {total} rows were asked for, but {have}")
        return self._output.spans[self.counts.rank]

    def remove(self) -> None:
        """Let the VAE compute all rows again."""
        for module, name in self._replaced:
            module.__dict__.pop(name, None)
        self._replaced.clear()

    def _replace(self, module: nn.Module, name: str, method: Callable[..., Any]) -> None:
        # An attribute of the instance hides the method of its class until `remove`.
        module.__dict__[name] = method
        self._replaced.append((module, name))

    def _decode(self, decode: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(decode)
        def decode_rows(z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not self._is_tall_enough(z.shape[-2]):
                return self._own_rows(decode(z, *args, **kwargs), z.shape[-2])
            cuts = self._cut(z.shape[-2])
            if hasattr(self._model, "decode_output_shape"):
                kwargs["output_buffer"] = self._buffer(z, cuts, kwargs.get("output_buffer"))
            return self._by_rows(decode, z, cuts, args, kwargs)

        return decode_rows

    def _encode(self, encode: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(encode)
        def encode_rows(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not self._is_tall_enough(x.shape[-2] // self._ratio):
                latent = encode(x, *args, **kwargs)
                return self._own_rows(latent, latent.shape[-2])
            return self._by_rows(encode, x, self._cut(x.shape[-2], self._ratio), args, kwargs)

        return encode_rows

    def _by_rows(self, method: Callable[..., Tensor], full: Tensor, cuts: Cuts, args: tuple, kwargs: dict) -> Tensor:
        code = sys.modules[type(self._model).__module__]
        with self._factories, ExitStack() as replacements:
            for name in self._by_memory:
                replacements.enter_context(replaced(code, name, _smallest_of_ranks))
            result = method(shared(full, cuts, self.counts), *args, **kwargs)
        local, self._output = finished(result)
        return local

    def _cut(self, rows: int, unit: int = 1) -> Cuts:
        """Cut rows over the ranks, by their speeds if these are unlike. A latent row is `unit` of them."""
        return cut(rows, self.counts.ranks, unit, shares.of_rows(self.counts.group), LEAST_LATENT_ROWS)

    def _is_tall_enough(self, latent_rows: int) -> bool:
        least = LEAST_LATENT_ROWS * self.counts.ranks
        if latent_rows < least:
            log.info(
                "The VAE is not split: %d latent rows are too few for %d ranks, %d at least",
                latent_rows,
                self.counts.ranks,
                least,
            )
        return latent_rows >= least

    def _own_rows(self, full: Tensor, latent_rows: int) -> Tensor:
        """Return this rank's rows of a result that every rank has in full."""
        self._output = self._cut(full.shape[-2], full.shape[-2] // latent_rows)
        start, stop = self._output.spans[self.counts.rank]
        return full.narrow(-2, start, stop - start)

    def _output_shape(self, whole: Callable[..., tuple[int, ...]]) -> Callable[..., tuple[int, ...]]:
        """Let ComfyUI make room for this rank's rows only, where it has a VAE write into its tensor."""

        def output_shape(input_shape: tuple[int, ...]) -> tuple[int, ...]:
            rows = input_shape[-2]
            if rows >= LEAST_LATENT_ROWS * self.counts.ranks:
                rows = self._cut(rows).sizes[self.counts.rank]
            return tuple(whole((*input_shape[:-2], rows, input_shape[-1])))

        return output_shape

    def _buffer(self, z: Tensor, cuts: Cuts, given: Tensor | None) -> Tensor:
        """Return the tensor that a VAE writes its frames into, with rows."""
        if given is None:
            shape = self._model.decode_output_shape(tuple(z.shape))
            given = torch.empty(shape, dtype=z.dtype, device=model_management.intermediate_device())
        factor = given.shape[-2] // cuts.sizes[self.counts.rank]
        return wrap(given, Rows(-2, cuts.scaled(factor)), self.counts)

    def _follow_noise(self, class_name: str, method_name: str) -> None:
        for module in self._model.modules():
            if type(module).__name__ == class_name:
                self._replace(module, method_name, self._with_noise(getattr(module, method_name)))

    def _with_noise(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def with_noise(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            with self._factories.noise_of(tensor):
                return method(tensor, *args, **kwargs)

        return with_noise


def _smallest_of_ranks(function: Callable[..., int]) -> Callable[..., int]:
    """Return a function whose result is the smallest of all ranks. Collective."""
    return lambda *args, **kwargs: smallest(int(function(*args, **kwargs)))
