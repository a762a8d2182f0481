"""The nodes that show the workers and end them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fault_server import JOB, FaultServer, assert_same

from raylight.dev.demo.graphs import on_workers


def status(server: FaultServer) -> str:
    # A seed of its own: of a graph that comes again ComfyUI would run nothing, and start no workers.
    asked = {"class_type": "RaylightStatus", "inputs": {"after": ["sample", 0]}}
    history = server.run(on_workers(replace(JOB, seed=20), 2) | {"status": asked}, timeout=180)
    return history.outputs["status"]["text"][0]


def test_status(server: FaultServer) -> None:
    text = status(server)
    assert "2 workers: batch 1 x ring 1 x Ulysses 2" in text
    assert text.count("holds wan.safetensors (replicated)") == 2
    assert text.count("rank 1 (cpu, pid") == 1
    assert "an all-reduce takes" in text and "bandwidth in each direction, with both in use, in GB/s" in text
    assert status(server) != "", "it is asked again each time"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["Kill Workers Only", "Kill Entire Cluster"])
def test_kill(mode: str, server: FaultServer, reference: torch.Tensor) -> None:
    server.run(on_workers(replace(JOB, seed=21), 2), timeout=180)
    before = server.workers()
    kill = {"class_type": "RayKill", "inputs": {"ray_actors": ["sample", 1], "kill_mode": mode}}
    # Other seeds each time: of a graph that comes again ComfyUI would run nothing.
    server.run(on_workers(replace(JOB, seed=22), 2) | {"kill": kill}, timeout=180)
    assert len(before) == 2
    server.assert_ended(before)
    assert (server.process_of("raylet") is not None) == (mode == "Kill Workers Only")
    assert_same(server.latent(on_workers(JOB, 2)), reference)
