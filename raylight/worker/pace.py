"""How far the host of a worker is ahead of its GPU."""

from __future__ import annotations

import torch


class Pace:
    """Lets the host prepare the next step of a run while the GPU computes one, and no more.

    What is launched is computed to its end: a cancel would wait for it, and progress would be shown long before.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._before: torch.cuda.Event | None = None

    def launched(self) -> torch.cuda.Event | None:
        """Note that a step is launched, and wait until the GPU has done the one before it. Return what the GPU reaches
        when it has done this one; None on the CPU, which has.
        """
        if not self._on_gpu:
            return None
        before, self._before = self._before, torch.cuda.Event(blocking=True)
        self._before.record()
        if before is not None:
            before.synchronize()
        return self._before
