"""When a worker is killed, at any time, the error names it, and the next prompt works."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from fault_server import BIG, ERROR_S, JOB, LOADING, FaultServer, assert_same, dropin

from raylight.dev.demo.graphs import on_workers

SLOW = {"rank": -1, "what": "sleep", "call": 0, "seconds": 0.4}


@pytest.mark.slow
def test_while_starting(server: FaultServer, reference: torch.Tensor) -> None:
    before = server.workers()
    prompt = server.submit(on_workers(JOB, 2, ray_cluster_namespace="another"))
    started = server.wait_until(lambda: len(new := [one for one in server.workers() if one not in before]) == 2 and new)
    started[1].kill()
    server.fails(prompt, r"rank \d.* died while starting: its process ended without a trace")
    server.assert_ended([*before, *started])
    assert_same(server.latent(on_workers(JOB, 2)), reference)


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_in_a_step(workers: int, server: FaultServer, reference: torch.Tensor) -> None:
    prompt = server.submit(dropin(replace(JOB, steps=99), workers, SLOW))
    server.wait_for_second_step()
    before, since = server.workers(), time.monotonic()
    assert len(before) == workers
    server.worker(1).kill()
    message = server.fails(
        prompt, r"rank 1 \(cpu, pid \d+ on 127.0.0.1\) died while step \d+ of 99: its process", since
    )
    assert "Connection" not in message, "what its peers met is not the root cause"
    server.assert_ended(before)
    assert_same(server.latent(on_workers(JOB, workers)), reference)


def test_while_loading(server: FaultServer, reference: torch.Tensor) -> None:
    assert_same(server.latent(on_workers(JOB, 2)), reference)
    prompt = server.submit(on_workers(replace(JOB, model=BIG), 2))
    server.wait_for_phase(LOADING)
    before, since = server.workers(), time.monotonic()
    server.worker(0).kill()
    server.fails(
        prompt, r"rank 0 .* died while (loading|reading|putting|applying|bringing|beginning|step).*: its process", since
    )
    server.assert_ended(before)
    assert_same(server.latent(on_workers(JOB, 2)), reference)


@pytest.mark.slow
def test_while_gathering(server: FaultServer, reference: torch.Tensor) -> None:
    end = {"rank": -1, "what": "sleep", "where": "end", "seconds": 30.0}
    prompt = server.submit(dropin(JOB, 2, end))
    server.wait_for_phase("ending the last step")
    before, since = server.workers(), time.monotonic()
    server.worker(1).kill()
    server.fails(prompt, r"rank 1 .* died while ending the last step: its process", since)
    server.assert_ended(before)
    assert_same(server.latent(on_workers(JOB, 2)), reference)


@pytest.mark.slow
def test_while_idle(server: FaultServer, reference: torch.Tensor) -> None:
    assert_same(server.latent(on_workers(replace(JOB, seed=1), 2)), server.latent(on_workers(replace(JOB, seed=1), 3)))
    before, since = server.workers(), server.log_size()
    server.worker(1).kill()
    server.wait_until(lambda: server.logged("died while waiting for work", since), ERROR_S)
    server.assert_ended(before)
    assert_same(server.latent(on_workers(JOB, 2)), reference)
