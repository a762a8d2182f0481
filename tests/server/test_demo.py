"""The demo as a person meets it: its pictures, its exit code, and Ctrl-C."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def demo(output: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "raylight.demo", "--steps", "2", "--output", str(output), *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )


def test_both_pictures_agree(tmp_path: Path) -> None:
    process = demo(tmp_path)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    difference = float(re.search(r"max difference: (\S+)", text).group(1))
    assert difference <= 1e-4
    assert len(re.findall(r"[\d.]+ s per step", text)) == 2
    for name in ("stock", "raylight"):
        with Image.open(tmp_path / f"{name}.webp") as picture:
            assert picture.n_frames == 5 and picture.size == (30 * 16, 22 * 16)


def test_failure_is_told_by_the_exit_code(tmp_path: Path) -> None:
    process = demo(tmp_path, "--workers", "5")  # the demo's model has 4 heads
    text, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "the demo failed" in text and "4 attention heads, too few for ulysses_degree = 5" in text


def test_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    process = demo(tmp_path)
    deadline = time.monotonic() + 120
    while not (family := _family_with_workers(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert family
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=90) == 130
    _, left = psutil.wait_procs(family, timeout=10)
    assert [p.name() for p in left] == []


def _family_with_workers(pid: int) -> list[psutil.Process]:
    """All descendants, once workers are among them."""
    family = psutil.Process(pid).children(recursive=True)
    try:
        return family if any("RankActor" in p.name() or "RankActor" in " ".join(p.cmdline()) for p in family) else []
    except psutil.Error:
        return []
