"""Faults of Ray itself, taken ports, and a full object store or disk."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fault_server import ERROR_S, JOB, FaultServer, assert_same, dropin

from raylight.dev.demo.graphs import on_workers, stock

pytestmark = pytest.mark.slow

SLOW = {"rank": -1, "what": "sleep", "call": 0, "seconds": 0.4}


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_ray_is_killed(name: str, server: FaultServer, reference: torch.Tensor) -> None:
    prompt = server.submit(dropin(replace(JOB, steps=99), 2, SLOW))
    server.wait_for_second_step()
    before, since = server.workers(), time.monotonic()
    server.process_of(name).kill()
    server.fails(prompt, rf"Ray's process {name} \(pid \d+\) has ended", since)
    server.assert_ended(before)
    assert_same(server.latent(on_workers(JOB, 2)), reference)


def test_ray_is_killed_while_idle(server: FaultServer, reference: torch.Tensor) -> None:
    assert_same(server.latent(on_workers(JOB, 2)), reference)
    before, since = server.workers(), server.log_size()
    server.process_of("gcs_server").kill()
    server.wait_until(lambda: server.logged("Ray's process gcs_server", since), ERROR_S)
    server.assert_ended(before)
    assert_same(server.latent(on_workers(replace(JOB, steps=3), 2)), server.latent(stock(replace(JOB, steps=3))))


def test_ports_that_are_taken(server: FaultServer, reference: torch.Tensor) -> None:
    """Take the default ports of Ray and PyTorch, and name one of them as the address of a cluster."""
    with contextlib.ExitStack() as stack:
        for port in (6379, 8265, 10001, 29500):
            listener = stack.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
            listener.listen()
        assert_same(server.latent(on_workers(JOB, 2, ray_cluster_namespace="ports")), reference)
        before = server.workers()
        prompt = server.submit(on_workers(JOB, 2, ray_cluster_address="127.0.0.1:29500"))
        server.fails(prompt, "no Ray cluster answers at ray_cluster_address = 127.0.0.1:29500: another program")
        assert server.workers() == before, "they are ended for a cluster that does not answer"
    assert_same(server.latent(on_workers(JOB, 2)), reference)


def test_a_full_object_store_on_a_full_disk(folder: Path, reference: torch.Tensor) -> None:
    # Above this usage Ray considers the disk full, and does not fall back on it.
    with FaultServer(folder, "full", RAY_local_fs_capacity_threshold="0.000001") as full:
        small = {
            "GPU_SELECT": "",
            "ray_object_store_gb": 0.1,
            "ray_dashboard_address": "None",
            "torch_dist_address": "127.0.0.1:29500",
        }

        def advanced(job):
            graph = on_workers(job, 2)
            graph["workers"]["class_type"] = "RayInitializerAdvanced"
            graph["workers"]["inputs"] |= small
            return graph

        assert_same(full.latent(advanced(JOB)), reference)
        before, since = full.workers(), full.log_size()
        prompt = full.submit(advanced(replace(JOB, width=4096, height=4096, frames=81, steps=1)))
        full.wait_until(lambda: full.logged("the workers do the whole run", since))
        full.fails(prompt, r"Ray's object store is full.*: no room for what is sent to the workers")
        assert_same(full.latent(advanced(JOB)), reference)
        assert full.workers() == before, "the workers stay"


def test_a_full_disk_under_the_temporary_folder(folder: Path, reference: torch.Tensor, short_folder: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", short_folder]
    full = subprocess.run(mount, capture_output=True, text=True)
    if full.returncode != 0:
        pytest.skip(f"this user may not mount a small disk: {full.stderr.strip()}")
    try:
        with FaultServer(folder, "no-room", RAY_TMPDIR=str(short_folder)) as server:
            prompt = server.submit(on_workers(JOB, 2))
            server.fails(prompt, rf"Ray does not start on this machine: the disk of {short_folder} has 0.1 MB left")
            subprocess.run(["mount", "-o", "remount,size=256m", short_folder], check=True)
            assert_same(server.latent(on_workers(JOB, 2)), reference)
            inside = list(short_folder.iterdir())
            assert [path.stat().st_mode & 0o777 for path in inside] == [0o700], "for this user alone"
        assert not list(short_folder.iterdir()), "left behind"
    finally:
        subprocess.run(["umount", "--lazy", short_folder], check=True)
