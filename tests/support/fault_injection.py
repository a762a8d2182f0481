"""Faults inside a worker: on one rank, at one call of the model or after the last step.

Workers can import this module, so its objects are sent as ComfyUI's own are.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

AT_MODEL, AT_BLOCK, AT_END = "model", "block", "end"


@dataclass
class Fault:
    """A fault on `rank` (-1: on all): `what` is "raise", "allocate", "kill", "stop" or "sleep".

    It happens at call `call` of the model, or of one of its blocks (from 1; 0: at every call), after `seconds`.
    """

    rank: int
    what: str
    call: int = 1
    seconds: float = 0.0
    calls: int = 0

    def around_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.call in (0, self.calls):
            self._happen()
        return executor(*args, **kwargs)

    def around_block(self, args: dict[str, Any], extra: dict[str, Any]) -> Any:
        self.calls += 1
        if self.call in (0, self.calls):
            self._happen()
        return extra["original_block"](args)

    def around_run(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        result = executor(*args, **kwargs)
        self._happen()
        return result

    def _happen(self) -> None:
        if not dist.is_initialized() or self.rank not in (-1, dist.get_rank()):
            return
        time.sleep(self.seconds)
        if self.what == "raise":
            raise ArithmeticError("the injected fault")
        if self.what == "allocate":
            torch.empty(1 << 50, dtype=torch.uint8)  # a petabyte: PyTorch's own allocator refuses
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
