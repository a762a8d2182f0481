"""Which processes are of the Ray that was started here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from raylight.cluster import orphan_guard


def test_children_of_before_a_restart_are_not_this_ray(tmp_path: Path) -> None:
    """Here they have the larger pids, which come last: pids begin again at some time."""
    program = tmp_path / "gcs_server"
    program.symlink_to(sys.executable)
    with subprocess.Popen([program, "-S", "-c", "import time; time.sleep(60)"]) as runs:
        dead = subprocess.Popen([program, "-S", "-c", ""])
        try:
            os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has asked for its exit code
            before = frozenset(orphan_guard.process_ids([psutil.Process(dead.pid)]))
            assert orphan_guard.children_named(("gcs_server",), before) == {"gcs_server": psutil.Process(runs.pid)}
        finally:
            runs.kill()
            dead.wait()
