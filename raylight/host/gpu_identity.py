"""Which GPU a device is, by a name that is the same in all processes."""

from __future__ import annotations

import platform

import torch


def gpu_identity(device: torch.device) -> str:
    """Return a name for the GPU of a device, the same in each process that uses it; "" for a CPU.

    An index will not do: a process counts the GPUs that it sees.
    """
    if device.type != "cuda":
        return ""
    return f"{platform.node()} {torch.cuda.get_device_properties(device).uuid}"
