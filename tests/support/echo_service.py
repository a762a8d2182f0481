"""A service for tests of sessions, with verbs that fail in many ways."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist

from raylight.cluster.config import Service
from raylight.cluster.run import RankContext, Run
from raylight.cluster.status import IDLE, STEP
from raylight.parallel.process_group import any_rank


class EchoService(Service):
    def __init__(self, context: RankContext, settings: Any) -> None:
        self.context, self.settings = context, settings
        self.cannot_recover = False

    def inventory(self) -> str:
        return "nothing but echoes"

    def spare_bytes(self) -> int:
        return 3

    def recover(self) -> bool:
        return not self.cannot_recover

    def count(self, run: Run, steps: int) -> tuple:
        for step in range(steps):
            run.emit(step)
        return f"rank {self.context.rank} of {self.context.world_size}", self.settings, steps

    def count_slowly(self, run: Run, steps: int) -> None:
        for step in range(steps):
            time.sleep(0.05)
            run.emit(step)
            run.check_cancelled()

    def mesh_shape(self, run: Run) -> tuple[int, ...]:
        """Return the degrees of the mesh, when all ranks have met over it."""
        for axis in ("batch", "ring", "ulysses"):
            dist.barrier(self.context.mesh.get_group(axis))
        return tuple(self.context.mesh.shape)

    def same_object(self, run: Run, data: bytes) -> bool:
        """Return whether all ranks received the same bytes."""
        total = torch.tensor([sum(data[:1000])])
        dist.all_reduce(total)
        return total.item() == self.context.world_size * sum(data[:1000])

    def refuse(self, run: Run) -> None:
        raise ValueError("no such thing")

    def refuse_in_own_time(self, run: Run) -> None:
        time.sleep(7 * self.context.rank)
        raise ValueError("no such thing")

    def fail_alike(self, run: Run, begins: str, kind: type[Exception]) -> None:
        """Raise the same error on all ranks, after they have begun some collectives."""
        if begins == "together":
            dist.barrier()
        elif begins == "unfinished":
            dist.all_reduce(torch.ones(1 << 22), async_op=True)
        elif begins == "more on one" and self.context.rank == 1:
            dist.isend(torch.ones(1), dst=0)
        self.cannot_recover = begins == "cannot recover"
        raise kind("no such part")

    def say_and_die(self, run: Run, text: str) -> None:
        """Log, wait until it is reported, and end the process of rank 1."""
        self.say(run, text)
        time.sleep(1)
        self.die_alone(run)

    def crash_alone(self, run: Run, signal_number: int) -> None:
        """Let a signal that native code gets for its faults end the process of rank 1."""
        if self.context.rank == 1:
            signal.raise_signal(signal_number)
        dist.barrier()

    def fail_alone(self, run: Run) -> None:
        if self.context.rank == 1:
            raise RuntimeError("rank 1 is unwell")
        dist.barrier()

    def stand_still(self, run: Run) -> None:
        """Rank 1 does not reach the collective in which rank 0 waits for it."""
        if self.context.rank == 1:
            time.sleep(60)
        any_rank(False)

    def hold_the_interpreter(self, run: Run) -> None:
        """Keep all other threads of rank 1 from running, so that it cannot answer."""
        if self.context.rank == 1:
            ctypes.PyDLL(None).sleep(60)

    def exhaust_memory(self, run: Run) -> None:
        torch.empty(1 << 50, dtype=torch.uint8)

    def say(self, run: Run, text: str) -> None:
        logging.getLogger("raylight.echo").info("%s, softly", text)
        logging.getLogger("raylight.echo").warning("%s, from rank %d", text, self.context.rank)
        print(text, "printed")

    def refuse_cancel(self, run: Run) -> None:
        """Never check whether the run was cancelled."""
        run.enter("deep in thought")
        time.sleep(60)

    def finish_step_late(self, run: Run, step_s: float, rest_s: float) -> None:
        """Be in one step for long, and let the result come some time after the step's end is reported."""
        run.enter(f"{STEP} 1 of 1")
        run.emit(1)
        time.sleep(step_s)
        run.enter(IDLE)
        time.sleep(rest_s)
        run.check_cancelled()

    def die_alone(self, run: Run) -> None:
        if self.context.rank == 1:
            os._exit(1)
        dist.barrier()


def open_service(context: RankContext, settings: Any) -> EchoService:
    return EchoService(context, settings)
