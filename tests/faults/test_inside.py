"""Faults inside one worker while it computes."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest
import torch
from fault_server import JOB, FaultServer, assert_same, dropin

from raylight.dev.demo.graphs import on_workers

SECONDS = 0.5  # until then the step is reported, which the error names


def test_an_exception(server: FaultServer, reference: torch.Tensor) -> None:
    before = server.workers_of_now()
    prompt = server.submit(dropin(JOB, 2, {"what": "raise", "call": 3, "seconds": SECONDS}))
    server.fails(prompt, r"rank 1 \(cpu, pid \d+ on 127.0.0.1\) failed while step \d of 4: ArithmeticError: the inj")
    server.assert_ended(before)
    assert_same(server.latent(on_workers(JOB, 2)), reference)


def test_memory_that_runs_out(server: FaultServer, reference: torch.Tensor) -> None:
    before = server.workers_of_now()
    prompt = server.submit(dropin(JOB, 2, {"what": "allocate", "call": 3, "seconds": SECONDS}))
    message = server.fails(prompt, r"rank 1 .* ran out of memory while step \d of 4: .*allocate")
    assert re.search(r"It held wan.safetensors \(replicated, 0.0\d GB on cpu", message)
    assert "switch FSDP on" in message and "a smaller size" in message
    server.assert_ended(before)
    assert_same(server.latent(on_workers(JOB, 2)), reference)


@pytest.mark.slow
def test_a_stopped_process(server: FaultServer, reference: torch.Tensor) -> None:
    prompt = server.submit(dropin(replace(JOB, steps=99), 2, {"rank": -1, "what": "sleep", "call": 0, "seconds": 0.4}))
    server.wait_for_second_step()
    before, since = server.workers(), time.monotonic()
    server.worker(1).suspend()
    server.fails(prompt, r"rank 1 .* failed while step \d+ of 99: its process was stopped", since)
    server.assert_ended(before)
    assert_same(server.latent(on_workers(JOB, 2)), reference)


@pytest.mark.slow
def test_fifty_prompts_leave_memory_as_it_is(server: FaultServer, reference: torch.Tensor) -> None:
    sizes = []
    for seed in range(50):
        server.latent(on_workers(replace(JOB, seed=seed, steps=1), 2))
        sizes.append(sum(process.memory_full_info().uss for process in (*server.workers(), server.process())))
    settled = sizes[5:15]
    assert max(sizes[40:]) < 1.01 * max(settled), [f"{size / 1e6:.1f}" for size in sizes]
    assert_same(server.latent(on_workers(JOB, 2)), reference)
