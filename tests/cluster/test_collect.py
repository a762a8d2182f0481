"""After an error that every rank met at the same place the workers stay, and only then."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from echo_service import EchoService

from raylight.cluster import active_session
from raylight.cluster.collect import Outcome, common_error
from raylight.cluster.config import ServiceSpec, SessionConfig
from raylight.cluster.errors import CRASHED, WorkerError
from raylight.cluster.session import Session
from raylight.parallel.heartbeat import agree
from raylight.parallel.mesh import MeshShape

ROOT = Path(__file__).resolve().parents[2]
SERVICE = ServiceSpec("echo_service:open_service", None, (str(ROOT), str(ROOT / "tests" / "support")))


def session() -> Session:
    return active_session.session(SessionConfig(MeshShape(ulysses=2), "cpu"), SERVICE)


@pytest.fixture(scope="module", autouse=True)
def end_of_module():
    yield
    active_session.close()


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (KeyError("blocks"), KeyError("blocks"), True),
        (
            RuntimeError("the size of tensor a (53) must match b (6)"),
            RuntimeError("the size of tensor a (52) must match b (6)"),
            True,
        ),
        (KeyError("blocks"), KeyError("heads"), False),
        (KeyError("blocks"), ValueError("'blocks'"), False),
        (
            RuntimeError("Connection closed by peer [127.0.0.1]:4242"),
            RuntimeError("Connection closed by peer [127.0.0.1]:4243"),
            False,
        ),
        (MemoryError(), MemoryError(), False),
    ],
)
def test_the_same_error(first: BaseException, second: BaseException, same: bool) -> None:
    assert (common_error(Outcome(errors={1: second, 0: first})) is first) is same
    assert common_error(Outcome(errors={0: first}, unfinished={1})) is None, "the other rank is still working"


def test_tallies() -> None:
    world, row = ("0", "[0, 1, 2]", "cpu"), ("1", "[0, 1]", "cpu")
    assert agree([{world: 7, row: 3}, {world: 7, row: 3}, {world: 7}])
    assert not agree([{world: 7, row: 3}, {world: 7, row: 4}, {world: 7}])
    assert not agree([{world: 7}, None])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("begins", "kind"),
    [("nothing", KeyError), ("together", KeyError), ("together", ValueError), ("unfinished", RuntimeError)],
)
def test_workers_stay(begins: str, kind: type[Exception]) -> None:
    before = session()
    with pytest.raises(kind, match="no such part"):
        before.run(EchoService.fail_alike, begins, kind)
    assert before.alive
    assert session() is before and before.run(EchoService.same_object, b"x" * 10) is True


@pytest.mark.slow
@pytest.mark.parametrize("begins", ["more on one", "cannot recover"])
def test_workers_end_where_they_are_not_known_to_be_in_step(begins: str) -> None:
    before = session()
    with pytest.raises(WorkerError, match="KeyError: 'no such part'"):
        before.run(EchoService.fail_alike, begins, KeyError)
    assert not before.alive


@pytest.mark.slow
def test_last_output_is_of_the_run_that_failed() -> None:
    once = session()
    once.run(EchoService.say, "an old story")
    with pytest.raises(WorkerError) as error:
        once.run(EchoService.say_and_die, "a new one")
    assert "a new one" in str(error.value) and "an old story" not in str(error.value)


@pytest.mark.slow
def test_a_crash_says_where() -> None:
    with pytest.raises(WorkerError) as error:
        session().run(EchoService.crash_alone, signal.SIGBUS)
    text = str(error.value)
    assert error.value.kind == CRASHED
    assert "its process crashed (Bus error)" in text and "without a trace" not in text
    assert "*** SIGBUS received" in text and "in crash_alone" in text
    assert text.count("SIGBUS") == 1 and "Extension modules" not in text and "in main_loop" not in text
