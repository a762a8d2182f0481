"""A real ComfyUI with faults in its workers."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fault_server import JOB, FaultServer, write_files

from raylight.dev.demo.graphs import stock


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with models, LoRAs, prompts and packs for the servers of these tests."""
    work = tmp_path_factory.mktemp("faults")
    write_files(work)
    return work


@pytest.fixture(scope="package")
def server(folder: Path) -> Iterator[FaultServer]:
    with FaultServer(folder, "server") as running:
        yield running


@pytest.fixture(scope="package")
def reference(server: FaultServer) -> torch.Tensor:
    """Return the latent that ComfyUI samples for JOB without workers."""
    return server.latent(stock(JOB))


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Return a folder with a path that is short enough for Ray's sockets."""
    path = Path(tempfile.mkdtemp(prefix="rl-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(autouse=True)
def log_of_a_failure(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        running = request.getfixturevalue("server")
        sys.stdout.write("ComfyUI's log:\n" + running.log_tail(60))
