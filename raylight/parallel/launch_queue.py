"""How much CUDA queues for a GPU before a launch holds up the host."""

from __future__ import annotations

import os

# One of NVIDIA's CUDA environment variables; llama.cpp sets it for the same reason.
VARIABLE = "CUDA_SCALE_LAUNCH_QUEUES"


def enlarge() -> None:
    """Let CUDA queue a whole forward and what comes after it, in this process, which has not used CUDA yet. What the
    user has set stays.

    A forward of Flux is a graph of 2600 nodes. In the queue of CUDA's own size the launches after it found no place
    until the GPU had done it, and only then the host prepared the next step.
    """
    os.environ.setdefault(VARIABLE, "4x")
