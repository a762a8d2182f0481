"""What a node shows while workers start and load: on the node that runs, and only while one runs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import comfy.utils
import pytest
from comfy_execution.utils import CurrentNodeContext

from raylight.driver import progress, workers
from raylight.host.jobs import DegreesChosen, ExchangeTold, LoadProgress, StepDone
from raylight.host.worker_service import WorkerService

LOADS = [LoadProgress("wan", done * 10**9, 4 * 10**9) for done in (0, 1, 4)]
STEP = (0, StepDone(0, 4, None, None))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Return what a server is asked to write, as text and node."""
    texts: list[tuple[str, str]] = []
    instance = SimpleNamespace(send_progress_text=lambda text, node: texts.append((text, node)))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    return texts


class LoadingSession:
    """A session whose rank 0 loads a model and does a step."""

    config = SimpleNamespace(device_type="cpu")

    def run_all(self, verb: Any, on_event: Callable[[Any], None], **_: Any) -> dict[int, Any]:
        for event in (*LOADS, STEP):
            on_event(event)
        return {0: "done"}


def test_loading_is_shown_and_kept_from_the_listener(
    shown: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bar: list[tuple[int, int]] = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: bar.append((value, total)))
    steps: list[Any] = []
    with CurrentNodeContext("prompt", "7"):
        assert workers.ask_all(LoadingSession(), WorkerService.sample, on_event=steps.append) == {0: "done"}
    assert steps == [STEP]
    texts = [text for text, node in shown if node == "7"]
    assert texts[:3] == [
        "Loading wan: 0 % (0.0 of 4.0 GB)",
        "Loading wan: 25 % (1.0 of 4.0 GB)",
        "Loading wan: 100 % (4.0 of 4.0 GB)",
    ]
    assert len(texts) == len(shown) == 4 and texts[3].startswith("wan is loaded: 4.0 GB in ")
    assert (4 * 10**9, 4 * 10**9) not in bar and bar[0] == (0, 4 * 10**9)


def test_degrees_are_shown_and_logged_and_stay_beside_the_loading(
    shown: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Choosing(LoadingSession):
        def run_all(self, verb: Any, on_event: Callable[[Any], None], **_: Any) -> dict[int, Any]:
            for event in (*LOADS[: self.loads], DegreesChosen("ulysses 4 (one row at a time)"), STEP):
                on_event(event)
            return {0: "done"}

    steps: list[Any] = []
    line = "degrees: ulysses 4 (one row at a time)"
    for loads in (0, len(LOADS)):
        monkeypatch.setattr(Choosing, "loads", loads, raising=False)
        with CurrentNodeContext("prompt", "7"), caplog.at_level(logging.INFO, "raylight"):
            workers.ask_all(Choosing(), WorkerService.sample, on_event=steps.append)
        assert (line, "7") in shown
        assert shown[-1][0].endswith(line) and shown[-1][0].startswith("wan is loaded" if loads else line)
    assert steps == [STEP, STEP] and caplog.messages.count(line) == 2


def test_what_is_told_of_exchanges_is_shown_beside_the_degrees(
    shown: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Telling(LoadingSession):
        def run_all(self, verb: Any, on_event: Callable[[Any], None], **_: Any) -> dict[int, Any]:
            for event in (*LOADS, DegreesChosen("ulysses 4"), ExchangeTold("in 8 bits")):
                on_event(event)
            return {0: "done"}

    with CurrentNodeContext("prompt", "7"), caplog.at_level(logging.INFO, "raylight"):
        workers.ask_all(Telling(), WorkerService.sample, on_event=lambda event: pytest.fail(f"{event}"))
    assert ("degrees: ulysses 4; exchange: in 8 bits", "7") in shown
    assert shown[-1][0].startswith("wan is loaded") and shown[-1][0].endswith("ulysses 4; exchange: in 8 bits")
    assert caplog.messages == ["degrees: ulysses 4", "exchange: in 8 bits"]


def test_the_time_of_loading_is_not_that_of_sampling(
    shown: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with CurrentNodeContext("prompt", "7"):
        loading = progress.Loading()
        for now[0], load in zip((1.0, 2.0, 5.0), LOADS, strict=True):
            loading.show(load)
        now[0] = 90.0
        loading.end()
    assert shown[-1][0] == "wan is loaded: 4.0 GB in 4.0 s"


def test_nothing_is_shown_outside_of_a_prompt(shown: list[tuple[str, str]]) -> None:
    progress.show_text("unseen")
    workers.ask_all(LoadingSession(), WorkerService.sample)
    assert shown == []
