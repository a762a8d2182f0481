"""Events of steps are sent when a GPU has done the steps; marks that threads set stand in for those of a GPU."""

from __future__ import annotations

import threading
import time

import pytest

from raylight.cluster.run import Run
from raylight.cluster.status import Status
from raylight.worker.step_reports import StepReports

WAIT_S = 10.0


class Mark:
    """What a GPU reaches when it has done a step."""

    def __init__(self) -> None:
        self.reached, self.waited_for = threading.Event(), threading.Event()

    def synchronize(self) -> None:
        self.waited_for.set()
        assert self.reached.wait(WAIT_S)


@pytest.fixture
def run() -> Run:
    return Run(0, Status())


def sent(run: Run, number: int) -> list[object]:
    """Return the next events, when they are there."""
    return [run._events.get(timeout=WAIT_S) for _ in range(number)]


def test_an_event_is_sent_when_its_step_is_done(run: Run) -> None:
    marks = [Mark() for _ in range(3)]
    with StepReports(run) as reports:
        for step, mark in enumerate(marks):
            reports.emit(step, mark)  # returns, though no step is done
        assert run._events.empty()
        marks[1].reached.set()
        assert run._events.empty(), "a step is reported before the one before it"
        marks[0].reached.set()
        assert sent(run, 2) == [0, 1]
        threading.Timer(0.05, marks[2].reached.set).start()
    assert sent(run, 1) == [2], "the run ended before its last step was reported"


def test_an_event_is_sent_at_once_where_the_host_computes(run: Run) -> None:
    with StepReports(run) as reports:
        reports.emit("step", None)
        assert not run._events.empty()
    assert sent(run, 1) == ["step"]


def test_a_cancel_waits_for_no_step(run: Run) -> None:
    marks = [Mark() for _ in range(3)]
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), StepReports(run) as reports:
        for step, mark in enumerate(marks):
            reports.emit(step, mark)
        assert marks[0].waited_for.wait(WAIT_S)
        raise KeyboardInterrupt
    assert time.monotonic() - began < WAIT_S / 2
    for mark in marks:
        mark.reached.set()
    assert sent(run, 1) == [0]
    time.sleep(0.05)
    assert run._events.empty(), "an event was sent that the cancel has left out"
