"""What is said of how a model without a plan is computed."""

from __future__ import annotations

from collections.abc import Callable

from torch.distributed.device_mesh import DeviceMesh

from raylight.parallel.mesh import AXES, sequence_axis

from .layouts import Tell
from .proving import Way


class Account:
    """The log of one model, and what the node that samples shows of its runs."""

    def __init__(self, mesh: DeviceMesh, log: Callable[[str], None]) -> None:
        self._log = log
        # Now, as these take milliseconds and every forward is told.
        self._degrees = " x ".join(f"{axis} {mesh[axis].size()}" for axis in AXES if mesh[axis].size() > 1)
        self._ranks = sequence_axis(mesh).size()
        self._logged: set[str] = set()
        self._told: dict[str, None] = {}  # in order
        self._tell: Tell = lambda _: None

    def use(self, tell: Tell, begins_run: bool) -> None:
        """Tell by this from now on what is said, once for each run."""
        self._tell = tell
        if begins_run:
            self._told.clear()

    def say(self, way: Way) -> None:
        """Tell how forwards are split from now on."""
        if way.plan is not None:
            text = f"{self._degrees} (no plan: a drafted one is proven)"
        elif way.rows:
            text = f"batch {self._ranks} (no plan, and no drafted one is equal)"
        else:
            text = "every worker does all (no plan, and none is proven)"
        if text not in self._told:
            self._told[text] = None
            self._tell("; ".join(self._told))

    def log(self, message: str) -> None:
        """Log a message once for this model."""
        if message not in self._logged:
            self._logged.add(message)
            self._log(message)
