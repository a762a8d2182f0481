"""When ComfyUI is killed, its workers and Ray end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fault_server import EXIT_S, JOB, FaultServer, dropin

pytestmark = pytest.mark.slow


def test_comfyui_is_killed_in_a_step(folder: Path, short_folder: Path) -> None:
    with FaultServer(folder, "killed", RAY_TMPDIR=str(short_folder)) as server:
        server.submit(dropin(replace(JOB, steps=99), 2, {"rank": -1, "what": "sleep", "call": 0, "seconds": 0.4}))
        server.wait_for_second_step()
        descendants = server.process().children(recursive=True)
        assert len(server.workers()) == 2 and len(descendants) > 4
        server.process().kill()
        server.assert_ended(descendants)
        server.wait_until(lambda: not list(short_folder.iterdir()), timeout_s=EXIT_S)
