"""Whether the machines of a session answer: asked by a connection to Ray's port on each.

The system there answers as long as it runs and the network does, however busy its workers and Python are. Ray's own
checks take half a minute or more, and are for clusters of thousands.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from .machines import Machine

_EVERY_S, _ANSWER_S = 0.5, 1.5
LOST_S = 4.0  # without any answer
_AT_ONCE = 16


class MachineWatch:
    """Asks machines in a thread of its own, until `stop`."""

    def __init__(self, machines: Iterable[Machine], ask: Callable[[Machine, float], bool] = Machine.answers) -> None:
        self._machines, self._ask = tuple(machines), ask
        self._silent_since: dict[Machine, float] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="raylight-machines", daemon=True)
        self._thread.start()

    def lost(self, node: str | None = None) -> Machine | None:
        """Return a machine that does not answer for `LOST_S`, None while all do. The machine `node`, which there is
        reason to suspect, is asked at once.
        """
        suspected = next((machine for machine in self._machines if machine.node == node), None)
        if suspected is not None and not self._ask(suspected, _ANSWER_S):
            return suspected
        now = time.monotonic()
        for machine, since in list(self._silent_since.items()):
            if now - since > LOST_S:
                return machine
        return None

    def stop(self) -> None:
        """End the thread. Does not wait for it."""
        self._end.set()

    def _watch(self) -> None:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            while not self._end.wait(_EVERY_S):
                began = time.monotonic()
                answers = list(pool.map(lambda machine: self._ask(machine, _ANSWER_S), self._machines))
                paused = time.monotonic() - began > 2 * _ANSWER_S * (1 + len(self._machines) // _AT_ONCE)
                for machine, answered in zip(self._machines, answers, strict=True):
                    if answered or paused:  # this process itself was stopped
                        self._silent_since.pop(machine, None)
                    else:
                        self._silent_since.setdefault(machine, began)
