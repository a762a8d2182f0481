"""Finds ComfyUI and the helpers of the tests, and prints what they measured and which versions they ran with.

`make test` leaves out the tests marked `slow`, `make test-all` runs all, and so does pytest itself. All that starts is
shared where it can be, because starts take most of the time on a small machine:

- Ranks (`raylight.dev.local_ranks.run_ranks`) are forked from a server that has imported PyTorch, ComfyUI and
  `support/preloaded.py`, so they start in a fraction of a second. Still, let one call measure all cases of a module in
  the ranks (`functools.cache`, or a fixture of the module), and each test look at its part.
- Ray's workers stay as long as their SessionConfig is the same, over modules too: 2 workers as
  `SessionConfig(MeshShape(ulysses=2), "cpu")` are there already in tests/host. Another number of workers costs 3 s for
  each, so let it change slowest among parameters. Do not close a session that you have not broken.
- A ComfyUI server takes 10 s, and as long again for its first workers: `shared_server` below is there for all tests
  that send graphs. Tests that hurt workers have one of their own (faults/conftest.py), shared too.

Limits of time are for a machine that is busy: what waits looks often and goes on at once, and gives up late.
"""

from __future__ import annotations

import importlib
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from shared_server import SharedServer

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from raylight.dev import local_ranks
from raylight.dev.setup import comfyui

COMFYUI = comfyui.find([ROOT], os.environ)
if COMFYUI is None:
    pytest.exit("the tests need a ComfyUI: run `make setup`, or set COMFYUI_PATH", returncode=4)
os.environ[comfyui.VARIABLE] = str(COMFYUI.root)  # for the servers that tests start

# ComfyUI before the pack, as in the workers: both have a module named `nodes`.
sys.path[:0] = [str(ROOT / "tests" / "support"), str(COMFYUI.root)]

import versions
from comfy.cli_args import args

# ComfyUI reads this when its modules are first imported, and would ask for a GPU otherwise.
args.cpu = not torch.cuda.is_available()

# As ComfyUI's start does, before `nodes`, which in 0.24 puts another module of this name before it on Python's path.
importlib.import_module("utils.extra_config")

# Threads that wait for each other on a busy machine make seconds of small models into minutes.
torch.set_num_threads(1)

local_ranks.fork_from_server("preloaded", [*sys.path[:2], str(ROOT)])

BEGIN = time.monotonic()
LONGEST = 12
NO_TIME = "no time was left (--seconds)"

_parity_lines: list[str] = []
_left_out: list[str] = []
_seconds: dict[str, float] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seconds", type=float, help="leave out the tests that have not begun after so many seconds, and say how many"
    )
    parser.addoption("--write-docs", action="store_true", help="write the documents that are made from test results")
    parser.addoption("--screenshots", type=Path, help="the folder in which browser tests keep what they saw")


def pytest_configure() -> None:
    # By default a terminated run would leave servers and workers behind: as after Ctrl-C, fixtures end them.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def report_parity():
    """Call it with one line per comparison; they are printed when the run ends."""
    return _parity_lines.append


@pytest.fixture
def as_comfyui_runs_nodes() -> Iterator[None]:
    """Inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file: a small Flux with guidance."""
    from comfy_cases import CASES, checkpoint

    return checkpoint(tmp_path_factory.mktemp("models"), CASES["Flux with guidance"])


@pytest.fixture(scope="module")
def stock(path: Path) -> ModelPatcher:
    """The model of that file, as ComfyUI loads it."""
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(path))


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedServer]:
    """A real ComfyUI for all tests that send graphs and leave it as it was (see support/shared_server.py)."""
    from shared_server import SharedServer

    with SharedServer(tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--seconds")
    if limit is not None and time.monotonic() - BEGIN > limit:
        _left_out.append(item.nodeid)
        pytest.skip(NO_TIME)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    file = report.nodeid.partition("::")[0]
    _seconds[file] = _seconds.get(file, 0.0) + report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _parity_lines:
        terminalreporter.section("parity with ComfyUI in one process")
        for line in _parity_lines:
            terminalreporter.write_line(line)
    if _left_out:
        terminalreporter.section(NO_TIME)
        terminalreporter.write_line(f"{len(_left_out)} tests were left out, the first of them {_left_out[0]}")
    longest = sorted(_seconds.items(), key=lambda item: -item[1])[:LONGEST]
    if longest and longest[0][1] > 10:
        terminalreporter.section("files that took longest")
        for file, seconds in longest:
            terminalreporter.write_line(f"{seconds:6.0f} s   {file}")
    terminalreporter.section("versions")
    here = versions.installed(versions.asked_for(COMFYUI.root))
    tested = versions.recorded(versions.FILE.read_text("utf-8"))
    lines = versions.differences(tested, here) or [f"all {len(here)} packages are as in {versions.FILE.name}"]
    terminalreporter.write_line(f"ComfyUI {COMFYUI.version}, Python {platform.python_version()}")
    for line in lines:
        terminalreporter.write_line(line)
