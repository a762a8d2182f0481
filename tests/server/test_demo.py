"""The demo as a user sees it: its pictures, its exit code, and Ctrl-C."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from raylight.cluster.orphan_guard import is_running

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def demo(output: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "raylight.dev.demo", "--steps", "2", "--output", str(output), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_all_pictures_agree(tmp_path: Path) -> None:
    process = demo(tmp_path, "--prompt", "a red house in the snow at night", "--prompt", "a pink tree on the moon")
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    differences = [float(number) for number in re.findall(r"max difference: (\S+)", text)]
    assert len(differences) == 2 and max(differences) <= 1e-4
    assert len(re.findall(r"[\d.]+ s per step", text)) == 3
    assert "has not learned: moon." in text
    for name in ("stock", "sampler-node", "drop-in"):
        pixels = [_pixels(tmp_path / f"{name}-{number}.png") for number in (1, 2)]
        assert [picture.shape for picture in pixels] == [(128, 128, 3)] * 2
        assert np.abs(pixels[0] - pixels[1]).max() > 20
        # A difference in the last digits may round to another colour.
        assert all(
            np.abs(picture - _pixels(tmp_path / f"stock-{number}.png")).max() <= 1
            for number, picture in enumerate(pixels, start=1)
        )
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 2 * 256 and sheet.height > 3 * 256


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_failure_is_told_by_the_exit_code(tmp_path: Path) -> None:
    process = demo(tmp_path, "--workers", "65", "--prompt", "a red house")
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "the demo failed" in text and "GPU = 65: at least 1 and at most 64" in text


def test_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    process = demo(tmp_path)
    deadline = time.monotonic() + 300
    while not (family := _family_with_workers(process.pid)) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert family, text
    assert process.returncode == 130, text
    deadline = time.monotonic() + 60
    while (left := [p for p in family if is_running(p)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == [], text


def _family_with_workers(pid: int) -> list[psutil.Process]:
    """All descendants, once workers are among them."""
    family = psutil.Process(pid).children(recursive=True)
    try:
        return family if any("RankActor" in p.name() or "RankActor" in " ".join(p.cmdline()) for p in family) else []
    except psutil.Error:
        return []
