"""The queue of a GPU is enlarged, unless the user has set its size."""

from __future__ import annotations

import os

import pytest

from raylight.parallel import launch_queue


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(launch_queue.VARIABLE, raising=False)
    launch_queue.enlarge()
    assert os.environ[launch_queue.VARIABLE] == "4x"
    monkeypatch.setenv(launch_queue.VARIABLE, "2x")
    launch_queue.enlarge()
    assert os.environ[launch_queue.VARIABLE] == "2x"
