"""The pack at ComfyUI's start: it takes little time, imports no heavy module, and does not fail if one is missing."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import nodes as comfy_nodes
from raylight.driver import preflight

pytestmark = pytest.mark.smoke
ROOT = Path(__file__).resolve().parents[2]
HOST = Path(comfy_nodes.__file__).parent
LARGEST_SECONDS = 0.5
STARTS = 5

# One process has imported what ComfyUI has when it comes to its custom nodes, and not the pack; each start is a fork.
SCRIPT = f"""
import asyncio, importlib.abc, json, logging, os, sys, time
from comfy.cli_args import args
args.cpu = True
import aiohttp.web, nodes, comfy_config.config_parser  # the first for its server

lines = []
class Log(logging.Handler):
    def emit(self, record):
        if "raylight" in record.getMessage().lower():
            lines.append(record.getMessage())

class Nothing(importlib.abc.MetaPathFinder):
    "Finds that these packages are not installed."
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "xfuser", "yunchang"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

async def at_the_graph():
    "What two connected nodes say."
    workers = nodes.NODE_CLASS_MAPPINGS["RayInitializer"]
    values = {{i.id: i.options[0] if i.default is None else i.default for i in workers.GET_SCHEMA().inputs}}
    try:
        chosen = (await workers.execute(**values)).result[0]
        nodes.NODE_CLASS_MAPPINGS["RayParallelizeModel"].execute(object(), chosen)
    except RuntimeError as error:
        return str(error)

def start(complete):
    logging.getLogger().addHandler(Log())
    logging.getLogger().setLevel(logging.INFO)
    if not complete:
        sys.meta_path.insert(0, Nothing())
    before, began = set(sys.modules), time.process_time()
    loaded = asyncio.run(nodes.load_custom_node({str(ROOT)!r}))
    seconds, new = time.process_time() - began, sorted(set(sys.modules) - before)
    registered = sorted(name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("Ray"))
    advice = None if complete else asyncio.run(at_the_graph())
    return dict(loaded=loaded, seconds=seconds, new=new, lines=lines, registered=registered, advice=advice)

for complete in [False] + [True] * {STARTS}:
    child = os.fork()
    if child == 0:
        print("ANSWER" + json.dumps(start(complete)), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def starts() -> list[dict[str, Any]]:
    """What ComfyUI says that has loaded the pack: first without Ray, then several times with all that is here."""
    if not hasattr(os, "fork"):
        pytest.skip("processes of POSIX")
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=HOST, timeout=120, capture_output=True, text=True)
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert len(answers) == 1 + STARTS, done.stdout + done.stderr
    return [json.loads(answer.removeprefix("ANSWER")) for answer in answers]


def test_takes_little_time_and_imports_nothing_heavy(starts: list[dict[str, Any]]) -> None:
    complete = starts[1:]
    assert all(one["loaded"] and one["lines"] == [] for one in complete)
    seconds = sorted(one["seconds"] for one in complete)
    assert statistics.median(seconds) < LARGEST_SECONDS, seconds
    heavy = {"ray", "safetensors", "xfuser", "yunchang", "diffusers", "triton", "torch"}
    assert [name for name in complete[0]["new"] if name.partition(".")[0] in heavy] == []


def test_a_start_without_ray_says_so_once_and_a_graph_again(starts: list[dict[str, Any]]) -> None:
    without = starts[0]
    assert without["loaded"] and without["registered"] == starts[1]["registered"]
    assert without["lines"] == [preflight.advice(["ray"])]
    assert without["advice"] == preflight.advice(["ray"])
    assert "Raylight needs the Python package ray" in without["advice"]
    assert f'pip install -r "{ROOT / "requirements.txt"}"' in without["advice"]


def test_the_same_for_several_packages(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    preflight.log_problems()
    (record,) = caplog.records
    assert "needs the Python packages ray and safetensors" in record.getMessage()


@pytest.mark.parametrize(
    ("version", "said"),
    [("0.18.2", True), ("0.23.9", True), (preflight.MINIMUM, False), ("0.100.0", False), ("1.0", False), ("", False)],
)
def test_an_old_comfyui(
    version: str, said: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preflight, "running", lambda: version)
    preflight.log_problems()
    expected = [
        f"Raylight is made for ComfyUI {preflight.MINIMUM} or later, and this is {version}: update ComfyUI if "
        "its nodes do not work"
    ]
    assert [record.getMessage() for record in caplog.records] == (expected if said else [])


def test_knows_the_comfyui_that_runs() -> None:
    from comfyui_version import __version__

    assert preflight.running() == __version__
