"""Workers that hang, do not answer, or ignore a cancel; their logs; the links between them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from echo_service import EchoService

from raylight.cluster import active_session
from raylight.cluster.config import ServiceSpec, SessionConfig
from raylight.cluster.errors import OUT_OF_MEMORY, RunCancelled, WorkerError
from raylight.parallel.mesh import MeshShape

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SERVICE = ServiceSpec("echo_service:open_service", "settings", (str(ROOT), str(ROOT / "tests" / "support")))


def session(**changes: object):
    return active_session.session(SessionConfig(MeshShape(ulysses=2), "cpu", **changes), SERVICE)


@pytest.fixture(scope="module", autouse=True)
def end_of_module():
    yield
    active_session.close()
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("limit", "verb", "message"),
    [
        (
            {"stall_timeout_s": 4.0},
            EchoService.stand_still,
            "rank 1 .* no progress for 4 s; the other ranks are waiting for it",
        ),
        (
            {"heartbeat_timeout_s": 5.0},
            EchoService.hold_the_interpreter,
            "rank 1 .* its process has not answered for 5 s",
        ),
    ],
)
def test_a_rank_that_hangs_is_named(limit: dict[str, float], verb: Callable, message: str) -> None:
    hung = session(**limit)
    began = time.monotonic()
    with pytest.raises(WorkerError, match=message):
        hung.run(verb)
    assert time.monotonic() - began < 20
    assert not hung.alive
    assert session(**limit).run(EchoService.count, 2)[2] == 2


def test_a_cancel_that_is_ignored_ends_the_workers() -> None:
    deaf, asked = session(), threading.Event()
    threading.Timer(1.0, asked.set).start()
    began = time.monotonic()
    with pytest.raises(RunCancelled):
        deaf.run(EchoService.refuse_cancel, wants_cancel=asked.is_set)
    assert time.monotonic() - began < 8
    assert not deaf.alive
    assert session().run(EchoService.count, 1)[2] == 1


def test_a_start_is_cancelled() -> None:
    began = time.monotonic()
    with pytest.raises(RunCancelled):
        active_session.session(
            SessionConfig(MeshShape(ulysses=2), "cpu", collective_timeout_s=599.0),
            SERVICE,
            wants_cancel=lambda: time.monotonic() - began > 1,
        )
    assert time.monotonic() - began < 8
    assert session().run(EchoService.count, 1)[2] == 1


def test_out_of_memory_names_what_the_rank_held() -> None:
    with pytest.raises(WorkerError, match="ran out of memory .* It held nothing but echoes") as error:
        session().run(EchoService.exhaust_memory)
    assert error.value.kind == OUT_OF_MEMORY
    assert error.value.spare_bytes == 3


def test_workers_log_to_this_process_once(caplog: pytest.LogCaptureFixture) -> None:
    active_session.close()  # workers take the level of the moment when they start
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.INFO)
    try:
        session().run(EchoService.say, "hello")
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and "hello printed" not in caplog.text:
            time.sleep(0.1)
        time.sleep(0.5)
    finally:
        root.setLevel(before)
    lines = [record.getMessage() for record in caplog.records if "hello" in record.getMessage()]
    assert sorted(lines) == [
        "rank 0: hello printed",
        "rank 0: hello, from rank 0",
        "rank 0: hello, softly",
        "rank 1: hello, from rank 1",
    ]


def test_links_are_measured_once_for_a_set_of_workers() -> None:
    links = session().links
    assert links.exact and set(links.bytes_per_s) == {(0, 1)} and 0 < links.latency_s < 1
    active_session.close()
    assert session().links is links
