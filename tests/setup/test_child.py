"""Exit codes, and a single Ctrl-C for the child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raylight.dev.setup.child import run_child

ROOT = Path(__file__).resolve().parents[2]

# Says READY, counts the SIGINTs while it cleans up after the first, and exits with 7.
CHILD = """
import signal, sys, time
count = 0
def interrupted(*_):
    global count
    count += 1
signal.signal(signal.SIGINT, interrupted)
print("READY", flush=True)
while not count: time.sleep(0.01)
time.sleep(0.5)
print("CLEANED after", count, flush=True)
sys.exit(7)
"""
PARENT = f"""
import os, sys
from raylight.dev.setup.child import run_child
from pathlib import Path
sys.exit(run_child([sys.executable, "-c", {CHILD!r}], Path.cwd(), os.environ))
"""
posix_only = pytest.mark.skipif(os.name == "nt", reason="signals and terminals of POSIX")


def run(script: str, **environ: str) -> int:
    return run_child([sys.executable, "-c", script], Path.cwd(), {**os.environ, **environ})


def test_exit_code_and_environment() -> None:
    assert run("") == 0
    assert run("import os, sys; sys.exit(int(os.environ['CODE']))", CODE="3") == 3


@posix_only
def test_exit_code_of_signal() -> None:
    assert run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)") == 128 + signal.SIGKILL


def test_restores_signal_handlers() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run("")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@posix_only
def test_passes_on_signal() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout.readline() == "READY\n"
    parent.send_signal(signal.SIGINT)
    output, _ = parent.communicate(timeout=120)
    assert (output, parent.returncode) == ("CLEANED after 1\n", 7)


@posix_only
def test_ctrl_c_arrives_once() -> None:
    at_terminal = f"""
import os, pty, sys
sys.exit(os.waitstatus_to_exitcode(pty.spawn([sys.executable, "-c", {PARENT!r}])))
"""
    terminal = subprocess.Popen(
        [sys.executable, "-c", at_terminal], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert b"READY" in terminal.stdout.readline()
    terminal.stdin.write(b"\x03")
    terminal.stdin.flush()
    assert b"CLEANED after 1" in terminal.stdout.readline()
    terminal.stdin.close()
    terminal.stdout.close()
    assert terminal.wait(timeout=120) == 7
