"""Finds ComfyUI and the helpers of the tests, and prints what parity tests measured."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from raylight.parallel import local_ranks  # noqa: E402
from raylight.setup import comfyui  # noqa: E402

COMFYUI = comfyui.find([ROOT], os.environ)
if COMFYUI is None:
    pytest.exit("the tests need a ComfyUI: run `make setup`, or set COMFYUI_PATH", returncode=4)
os.environ[comfyui.VARIABLE] = str(COMFYUI.root)  # for the servers that tests start

# ComfyUI before the pack, as in the workers: both have a module named `nodes`.
sys.path[:0] = [str(ROOT / "tests" / "support"), str(COMFYUI.root)]

from comfy.cli_args import args  # noqa: E402

# ComfyUI reads this when its modules are first imported, and would ask for a GPU otherwise.
args.cpu = not torch.cuda.is_available()

local_ranks.fork_from_server("preloaded", sys.path[:2] + [str(ROOT)])

_parity_lines: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-docs", action="store_true", help="write the documents that are made from test results")
    parser.addoption("--screenshots", type=Path, help="the folder in which browser tests keep what they saw")


@pytest.fixture(scope="session")
def report_parity():
    """Call it with one line per comparison; they are printed when the run ends."""
    return _parity_lines.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _parity_lines:
        terminalreporter.section("parity with ComfyUI in one process")
        for line in _parity_lines:
            terminalreporter.write_line(line)
