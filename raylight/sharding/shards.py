"""A rank's rows of sharded weights: in the memory of its device, or only in the file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .file_weight import FileWeight
from .rows import RowSplit


def own_rows(model: nn.Module, weights: Mapping[str, Tensor], split: RowSplit) -> dict[str, FileWeight]:
    """Return this rank's rows of each sharded parameter by its name, in its dtype, as the file `weights` has them."""
    found = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            rows = split.own(parameter.shape[0])
            found[name] = FileWeight.of(weights[name], parameter.dtype).rows(rows.start, rows.stop)
    return found


class Shards:
    """The shards of a model, whose memory can be given back: the file has what was in it.

    The parameters stay, and have memory again after `read`.
    """

    def __init__(self, model: nn.Module, rows: Mapping[str, FileWeight]) -> None:
        """`rows` is that of `own_rows`."""
        self._model = model
        self._rows = rows
        self._released: dict[str, int] = {}  # bytes of storages, by the names of parameters

    @property
    def released(self) -> bool:
        """Whether the memory of a shard was given back, and it was not read since."""
        return bool(self._released)

    @property
    def bytes_to_read(self) -> int:
        """How many bytes of the file `read` reads."""
        return sum(self._rows[name].file_bytes for name in self._released)

    def release(self) -> None:
        """Give the memory of all shards back."""
        for name in self._rows:
            storage = self._local(name).untyped_storage()
            if storage.nbytes():
                self._released[name] = storage.nbytes()
                storage.resize_(0)

    def read(self) -> None:
        """Read the shards whose memory was given back. Raises as `copy_weight`; another call goes on from there."""
        for name, nbytes in list(self._released.items()):
            local = self._local(name)
            storage = local.untyped_storage()
            storage.resize_(nbytes)
            if nbytes > local.nbytes:  # it is padded
                torch.empty(0, dtype=torch.uint8, device=local.device).set_(storage).zero_()
            self._rows[name].read_into(local)
            del self._released[name]

    def _local(self, name: str) -> Tensor:
        parameter = self._model.get_parameter(name)
        assert isinstance(parameter, DTensor)
        return parameter.to_local().detach()
