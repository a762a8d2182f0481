"""Ranks on this machine, one process each, for tests and benchmarks."""

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
    """Fork later CPU ranks from one server process that imports `module`, found in the folders `search`.

    A spawned rank takes seconds to import PyTorch and its function's modules. A forked one has them already, and its
    state is as clean because the server computes nothing. The server starts with the first ranks and ends with this
    process. On a system without fork servers, ranks are spawned as before.
    """
    global _server
    if "forkserver" in mp.get_all_start_methods():
        _server = module, tuple(search)


@dataclass(frozen=True)
class RankResult:
    """The outcome of one rank: its return value, or in `error` a traceback or a note that it never answered."""

    value: Any = None
    error: str | None = None


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = 300.0,
    collective_timeout_s: float = 120.0,
    device_type: str = "cpu",
) -> list[RankResult]:
    """Call `function(rank, world_size, *args)` on `world_size` ranks; kill processes that do not end.

    Ranks connect over gloo. With `device_type` "cuda", rank r has GPU r to itself, and NCCL as well.
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
    """Return the start method: spawn for GPUs, whose drivers cannot be inherited."""
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
    """Return the ranks' values. Raises RuntimeError: a rank failed; the message has all tracebacks."""
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
    except BaseException:  # reported to the parent, whatever it was
        answer = RankResult(error=traceback.format_exc())
    results.put((rank, answer))
