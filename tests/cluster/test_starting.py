"""Sessions that start in the background, and after a failure."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
from echo_service import EchoService
from waiting import wait_until

from raylight.cluster import active_session, starting
from raylight.cluster.config import ServiceSpec, SessionConfig
from raylight.cluster.errors import RunCancelled, WorkerError
from raylight.cluster.joining import check_cluster
from raylight.parallel.mesh import MeshShape

ROOT = Path(__file__).resolve().parents[2]
SEARCH = (str(ROOT), str(ROOT / "tests" / "support"))
SERVICE = ServiceSpec("echo_service:open_service", "settings", SEARCH)
BROKEN = ServiceSpec("echo_service:open_service", "settings", SEARCH, "echo_service:not_there")
TWO, ANOTHER = SessionConfig(MeshShape(ulysses=2), "cpu"), SessionConfig(MeshShape(), "cpu")


@pytest.fixture(scope="module", autouse=True)
def end_of_module():
    yield
    active_session.close()
    assert not ray.is_initialized()


def named(name: str, processes: list[psutil.Process]) -> list[psutil.Process]:
    """Return those of some processes that run and whose name begins with `name`."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it has ended
            if process.name().startswith(name) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def raylets() -> list[psutil.Process]:
    return named("raylet", psutil.Process().children())


def workers() -> list[psutil.Process]:
    """Return the processes of this process's workers, and not of a ComfyUI server that other tests have started."""
    return [child for raylet in raylets() for child in named("ray::RankActor", raylet.children())]


def test_a_start_in_the_background_is_the_one_that_is_waited_for() -> None:
    active_session.close(keep_ray=True)
    active_session.begin(TWO, SERVICE)
    active_session.begin(TWO, SERVICE)
    assert active_session.running() is None, "it has not waited for them"
    shown: list[str] = []
    session = active_session.session(TWO, SERVICE, on_progress=shown.append)
    assert session.run(EchoService.count, 2)[2] == 2
    assert shown[0].startswith("Starting workers") and shown[-1] == "Starting workers: 2 of 2 ready"
    active_session.begin(TWO, SERVICE)
    assert active_session.session(TWO, SERVICE) is session and len(workers()) == 2


def test_ray_starts_nothing_that_has_nothing_to_do() -> None:
    active_session.session(TWO, SERVICE)
    programs = [" ".join(child.cmdline()) for child in psutil.Process().children()]
    of_ray = [os.path.basename(word) for program in programs if "ray" in program for word in program.split()[:3]]
    assert {"gcs_server", "raylet"} <= set(of_ray)
    assert not {"dashboard.py", "monitor.py", "log_monitor.py"} & set(of_ray), programs


def test_the_last_that_is_wanted_wins() -> None:
    active_session.begin(TWO, SERVICE)
    active_session.begin(ANOTHER, SERVICE)
    active_session.begin(ANOTHER, SERVICE, replace=False)
    session = active_session.session(ANOTHER, SERVICE)
    assert len(session.places) == 1
    wait_until(lambda: [one.pid for one in workers()] == [session.places[0].pid])
    active_session.begin(TWO, SERVICE, replace=False)
    assert active_session.session(ANOTHER, SERVICE) is session


def test_an_error_is_raised_once_where_it_is_waited_for() -> None:
    active_session.close(keep_ray=True)
    active_session.begin(TWO, BROKEN)
    with pytest.raises(WorkerError, match="not_there"):
        active_session.session(TWO, BROKEN)
    wait_until(lambda: not workers())
    assert active_session.session(TWO, SERVICE).run(EchoService.count, 1)[2] == 1


def test_a_wrong_address_ends_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_slowly(config: SessionConfig) -> None:
        time.sleep(0.0 if config.is_local else 0.5)
        check_cluster(config)

    monkeypatch.setattr(starting, "check_cluster", check_slowly)
    before = active_session.session(TWO, SERVICE)
    nowhere = replace(TWO, address="127.0.0.1:1")
    for _ in range(2):
        active_session.begin(nowhere, SERVICE)
        with pytest.raises(ConnectionError, match="no Ray cluster answers at ray_cluster_address = 127.0.0.1:1"):
            active_session.session(nowhere, SERVICE)
        assert active_session.running() is before
    for passed_s in (0.0, 1.0):  # before the wrong one is found out, and after
        active_session.begin(nowhere, SERVICE)
        time.sleep(passed_s)
        assert active_session.session(TWO, SERVICE) is before, "the address is right again before anyone has waited"
    assert before.run(EchoService.count, 1)[2] == 1


def test_ray_of_a_start_that_failed_or_was_cancelled_is_not_that_of_another_configuration() -> None:
    active_session.close()
    with pytest.raises(WorkerError):
        active_session.session(TWO, BROKEN)
    assert ray.is_initialized()
    active_session.session(replace(ANOTHER, namespace="one"), SERVICE)
    assert ray.get_runtime_context().namespace == "one"
    active_session.close()
    active_session.begin(TWO, SERVICE)
    active_session.session(replace(ANOTHER, namespace="other"), SERVICE)
    assert ray.get_runtime_context().namespace == "other"
    active_session.close()


def test_a_cancel_ends_the_wait_and_not_the_start() -> None:
    active_session.close(keep_ray=True)
    began = time.monotonic()
    with pytest.raises(RunCancelled):
        active_session.session(TWO, SERVICE, wants_cancel=lambda: time.monotonic() - began > 0.5)
    assert active_session.running() is None, "it has not waited for them"
    wait_until(active_session.running)
    assert active_session.session(TWO, SERVICE) is active_session.running()


def test_closing_ends_a_start() -> None:
    active_session.close(keep_ray=True)
    active_session.begin(TWO, SERVICE)
    wait_until(workers)
    active_session.close(keep_ray=True)
    assert active_session.running() is None
    wait_until(lambda: not workers())


def test_new_workers_start_after_a_failure_of_workers_that_had_worked() -> None:
    session = active_session.session(TWO, SERVICE)
    with pytest.raises(WorkerError):
        session.run(EchoService.die_alone)
    assert active_session._start is None, "they had done nothing yet"
    wait_until(lambda: not workers())
    session = active_session.session(TWO, SERVICE)
    session.run(EchoService.count, 1)
    with pytest.raises(WorkerError):
        session.run(EchoService.die_alone)
    wait_until(active_session.running)
    assert active_session.running() is not session
    assert active_session.session(TWO, SERVICE).run(EchoService.count, 1)[2] == 1


def test_new_workers_start_after_a_failure_between_runs() -> None:
    session = active_session.session(TWO, SERVICE)
    session.run(EchoService.count, 1)
    psutil.Process(session.places[1].pid).kill()
    wait_until(lambda: active_session.running() not in (None, session))
    active_session.close(keep_ray=True)
    time.sleep(1)
    assert not workers(), "closing is no failure"


def test_another_mesh_keeps_the_workers() -> None:
    session = active_session.session(TWO, SERVICE)
    places = dict(session.places)
    for mesh in (MeshShape(batch=2), MeshShape(ring=2), MeshShape(ulysses=2)):
        again = active_session.session(SessionConfig(mesh, "cpu", stall_timeout_s=77.0), SERVICE)
        assert again is session and session.places == places
        assert session.run(EchoService.mesh_shape) == (mesh.batch, mesh.ring, mesh.ulysses)


def test_another_mesh_does_not_begin_a_start_again() -> None:
    active_session.close(keep_ray=True)
    active_session.begin(TWO, SERVICE)
    wait_until(workers)
    before = {one.pid for one in workers()}
    another = replace(TWO, mesh=MeshShape(batch=2))
    active_session.begin(another, SERVICE)
    session = active_session.session(another, SERVICE)
    assert before <= {place.pid for place in session.places.values()}
    assert session.run(EchoService.mesh_shape) == (2, 1, 1)


def test_a_rank_that_dies_while_the_mesh_changes() -> None:
    session = active_session.session(TWO, SERVICE)
    psutil.Process(session.places[1].pid).kill()
    with pytest.raises(WorkerError, match="rank 1"):
        session.reshape(SessionConfig(MeshShape(batch=2), "cpu"), lambda _: "", lambda: False)
    assert not session.alive
    assert active_session.session(TWO, SERVICE).run(EchoService.mesh_shape) == (1, 1, 2)


def test_ray_that_was_started_early_is_that_of_the_workers() -> None:
    active_session.close()
    active_session.begin_ray(TWO, SERVICE)
    active_session.begin_ray(ANOTHER, SERVICE)
    assert not ray.is_initialized(), "it has not waited for it"
    wait_until(lambda: ray.is_initialized() and raylets())
    before = raylets()
    assert not workers()
    session = active_session.session(ANOTHER, SERVICE)
    assert raylets() == before and len(session.places) == 1
    active_session.begin_ray(TWO, SERVICE)
    assert active_session.running() is session
    active_session.close(keep_ray=True)
    assert raylets() == before


@pytest.mark.slow
def test_workers_do_not_wait_for_another_ray_that_was_started_early() -> None:
    active_session.close()
    active_session.begin_ray(replace(TWO, namespace="early"), SERVICE)
    session = active_session.session(TWO, SERVICE)
    assert ray.get_runtime_context().namespace == TWO.namespace
    assert session.run(EchoService.count, 1)[2] == 1


# In a process of its own: where the watch fails, Ray ends the process.
EARLY = """
import logging, sys, time
import psutil, ray
from echo_service import EchoService
from raylight.cluster import active_session
from raylight.cluster.config import ServiceSpec, SessionConfig
from raylight.parallel.mesh import MeshShape

class Kept(logging.Handler):
    messages = []
    def emit(self, record):
        self.messages.append(record.getMessage())

def wait(condition):
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.05)

logging.basicConfig(level=logging.INFO, handlers=[Kept()])
service = ServiceSpec("echo_service:open_service", "settings", tuple(sys.path[1:3]))
config = SessionConfig(MeshShape(), "cpu")
active_session.begin_ray(config, service)
ready = lambda: "Ray is ready to start workers" in Kept.messages
wait(ready if sys.argv[1] == "ready" else ray.is_initialized)
next(child for child in psutil.Process().children() if child.name().startswith("raylet")).kill()
wait(lambda: not ray.is_initialized())
assert active_session.session(config, service).run(EchoService.count, 1)[2] == 1
active_session.close()
print("it lives")
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["ready", "just started"])
def test_the_end_of_ray_that_was_started_early_does_not_end_its_process(when: str, tmp_path: Path) -> None:
    script = tmp_path / "early.py"
    script.write_text(EARLY)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(SEARCH)}
    done = subprocess.run([sys.executable, script, when], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "it lives" in done.stdout, done.stdout + done.stderr
