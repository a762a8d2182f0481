"""Where a rank runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank runs: the address and the name of its machine, and Ray's id for it. `gpu` is the index of its GPU
    on that machine, None if unknown or without one; `memory_bytes` is all memory of that GPU, 0 without one.
    """

    rank: int
    host: str
    pid: int
    device: str
    gpu: int | None = None
    machine: str = ""
    node: str = ""
    memory_bytes: int = 0

    @property
    def name(self) -> str:
        """The rank and its device, for messages that are not about its process."""
        return f"rank {self.rank} ({self.device})"

    @property
    def where(self) -> str:
        """The machine, for messages: its name and address, or the address alone within one machine."""
        is_here = self.host.startswith("127.") or not self.machine
        return self.host if is_here else f"{self.machine}, {self.host}"

    def __str__(self) -> str:
        device = self.device if self.gpu is None else f"{self.device}, GPU {self.gpu}"
        return f"rank {self.rank} ({device}, pid {self.pid} on {self.where})"
