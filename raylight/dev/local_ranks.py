"""Ranks on this machine, one process each, for tests and benchmarks: what each returned or raised."""

from __future__ import annotations

import multiprocessing as mp
import multiprocessing.forkserver
import os
import queue
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from raylight.parallel.process_group import Rendezvous, host_store, join_world

_server: tuple[str, tuple[str, ...]] | None = None


def fork_from_server(module: str, search: Sequence[str]) -> None:
    """From now on fork ranks on the CPU from one server process that imports `module`, found in the folders `search`.

    A spawned rank takes seconds to import PyTorch and whatever its function is made of; a forked one has them, and is
    as fresh, because the server computes nothing. It starts with the first ranks and ends with this process. Where the
    system has no such servers, ranks are spawned as before.
    """
    global _server
    if "forkserver" in mp.get_all_start_methods():
        _server = module, tuple(search)


@dataclass(frozen=True)
class RankResult:
    """What one rank did. `error` holds a traceback when it raised, or says that it never answered."""

    value: Any = None
    error: str | None = None


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = 120.0,
    collective_timeout_s: float = 60.0,
    device_type: str = "cpu",
) -> list[RankResult]:
    """Call `function(rank, world_size, *args)` on that many ranks; processes that do not end are killed.

    They meet over gloo; with a `device_type` of "cuda" rank r has GPU r to itself, and NCCL as well.
    """
    context = _context(device_type)
    results: mp.Queue = context.Queue()
    store, rendezvous = host_store("127.0.0.1", world_size, collective_timeout_s)
    processes = [
        context.Process(target=_rank, args=(rank, device_type, rendezvous, results, function, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    answers = [RankResult(error="never answered") for _ in range(world_size)]
    deadline, missing = time.monotonic() + timeout_s, world_size
    while missing and time.monotonic() < deadline:
        try:
            rank, answer = results.get(timeout=0.5)
        except queue.Empty:
            if not any(process.is_alive() for process in processes):
                break
            continue
        answers[rank] = answer
        missing -= 1
    for process in processes:
        process.join(timeout=10)
        if process.is_alive():
            process.kill()
            process.join()
    del store
    return answers


def _context(device_type: str) -> Any:
    """How processes start: always anew for GPUs, whose drivers may not be inherited."""
    if _server is None or device_type != "cpu":
        return mp.get_context("spawn")
    module, search = _server
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([module])
    # Python before 3.13 starts the server without the path of this process.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*search, *([before] if before else [])])
    try:
        mp.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def values(answers: list[RankResult]) -> list[Any]:
    """The ranks' values. Raises RuntimeError with the tracebacks when one raised."""
    failed = [f"rank {rank}: {answer.error}" for rank, answer in enumerate(answers) if answer.error]
    if failed:
        raise RuntimeError("\n".join(failed))
    return [answer.value for answer in answers]


def _rank(
    rank: int, device_type: str, rendezvous: Rendezvous, results: Any, function: Callable[..., Any], args: tuple
) -> None:
    torch.set_num_threads(1)
    device = torch.device(device_type, rank if device_type == "cuda" else 0)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        join_world(rendezvous, rank, device)
        answer = RankResult(value=function(rank, rendezvous.world_size, *args))
        dist.destroy_process_group()
    except BaseException:  # the parent is told, whatever it was
        answer = RankResult(error=traceback.format_exc())
    results.put((rank, answer))
