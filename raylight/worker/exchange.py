"""How one model's attention exchanges tokens, by the name that a job has, and what is told of an exchange in 8 bits."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh

from raylight.parallel.exchange_error import ErrorMeter, hybrid_attention
from raylight.parallel.external_strategies import OURS, OURS_INT8, ExternalAttention, is_ours
from raylight.parallel.sequence_attention import Strategy

from .layouts import Tell


class Exchange:
    """Makes the strategies of one model. Of exchanges in 8 bits it tells once in each run: their error, as measured in
    the first forward, or that none was measured.
    """

    def __init__(self) -> None:
        self._name = OURS
        self._meter = ErrorMeter()
        self._tells = False

    def begin(self, name: str, begins_run: bool, is_compiled: bool) -> None:
        """Exchange by the strategy `name` from now on. The error is not measured of a model that `is_compiled` as a
        whole, where it is not known on all ranks alike when a forward begins.
        """
        self._name = name
        if begins_run:
            self._meter.clear()
            self._tells = self.meter is not None
            if self._tells and not is_compiled:
                self._meter.begin()

    @property
    def meter(self) -> ErrorMeter | None:
        """The meter of an exchange in 8 bits, None for an exact one."""
        return self._meter if self._name == OURS_INT8 else None

    def strategy(self, mesh: DeviceMesh) -> Strategy:
        """Return the strategy by which the ranks of a mesh exchange tokens.

        Raises ValueError: when its library cannot be imported.
        """
        ulysses, ring = (mesh.get_group(axis) for axis in ("ulysses", "ring"))
        ours = hybrid_attention(ulysses, ring, self.meter)
        if is_ours(self._name):
            return ours
        try:
            return ExternalAttention(self._name, ulysses, ring, ours)
        except ImportError as error:
            raise ValueError(f"sequence_attention = {self._name} cannot be used: {error}; choose {OURS}") from error

    def begins_forward(self) -> bool:
        """As that of `ErrorMeter`."""
        return self._meter.begins_forward()

    def tell(self, tell: Tell) -> None:
        """Tell of a run's exchange in 8 bits, after its first step. Waits for the device the first time."""
        if not self._tells:
            return
        self._tells = False
        error = self._meter.end()
        if error is None:
            tell(
                "in 8 bits where tokens are split; its error was not measured, as this run's first forward has split "
                "none, or is compiled"
            )
        else:
            calls = "1 attention call" if error.calls == 1 else f"{error.calls} attention calls"
            tell(f"in 8 bits, which {error}, relative L2 in {calls} of the first forward")
