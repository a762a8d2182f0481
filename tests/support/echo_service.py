"""A service for tests of sessions: what it does is visible from outside."""

from __future__ import annotations

import ctypes
import logging
import os
import time
from typing import Any

import torch
import torch.distributed as dist

from raylight.cluster.actor import RankContext, Run
from raylight.cluster.config import Service
from raylight.parallel.process_group import any_rank


class EchoService(Service):
    def __init__(self, context: RankContext, settings: Any) -> None:
        self.context, self.settings = context, settings
        self.is_beyond_repair = False

    def inventory(self) -> str:
        return "nothing but echoes"

    def recover(self) -> bool:
        return not self.is_beyond_repair

    def count(self, run: Run, steps: int) -> tuple:
        for step in range(steps):
            run.emit(step)
        return f"rank {self.context.rank} of {self.context.world_size}", self.settings, steps

    def count_slowly(self, run: Run, steps: int) -> None:
        for step in range(steps):
            time.sleep(0.05)
            run.emit(step)
            run.check_cancelled()

    def same_object(self, run: Run, data: bytes) -> bool:
        """Whether all ranks were given the same bytes."""
        total = torch.tensor([sum(data[:1000])])
        dist.all_reduce(total)
        return total.item() == self.context.world_size * sum(data[:1000])

    def refuse(self, run: Run) -> None:
        raise ValueError("no such thing")

    def refuse_in_own_time(self, run: Run) -> None:
        time.sleep(7 * self.context.rank)
        raise ValueError("no such thing")

    def fail_alike(self, run: Run, begins: str, kind: type[Exception]) -> None:
        """All ranks raise the same, after they have begun these collectives."""
        if begins == "together":
            dist.barrier()
        elif begins == "unfinished":
            dist.all_reduce(torch.ones(1 << 22), async_op=True)
        elif begins == "more on one" and self.context.rank == 1:
            dist.isend(torch.ones(1), dst=0)
        self.is_beyond_repair = begins == "beyond repair"
        raise kind("no such part")

    def say_and_die(self, run: Run, text: str) -> None:
        """Log, take a moment to have it sent, and end the process of rank 1."""
        self.say(run, text)
        time.sleep(1)
        self.die_alone(run)

    def fail_alone(self, run: Run) -> None:
        if self.context.rank == 1:
            raise RuntimeError("rank 1 is unwell")
        dist.barrier()

    def stand_still(self, run: Run) -> None:
        """Rank 1 does not come to where rank 0 waits for it."""
        if self.context.rank == 1:
            time.sleep(60)
        any_rank(False)

    def hold_the_interpreter(self, run: Run) -> None:
        """Rank 1 cannot answer: no other thread of its process runs."""
        if self.context.rank == 1:
            ctypes.PyDLL(None).sleep(60)

    def exhaust_memory(self, run: Run) -> None:
        torch.empty(1 << 50, dtype=torch.uint8)

    def say(self, run: Run, text: str) -> None:
        logging.getLogger("raylight.echo").info("%s, softly", text)
        logging.getLogger("raylight.echo").warning("%s, from rank %d", text, self.context.rank)
        print(text, "printed")

    def refuse_cancel(self, run: Run) -> None:
        """Does not look whether it was cancelled."""
        run.enter("deep in thought")
        time.sleep(60)

    def die_alone(self, run: Run) -> None:
        if self.context.rank == 1:
            os._exit(1)
        dist.barrier()


def open_service(context: RankContext, settings: Any) -> EchoService:
    return EchoService(context, settings)
