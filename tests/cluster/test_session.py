"""Sessions on real Ray, with a service that knows nothing of models."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from echo_service import EchoService

from raylight.cluster import active_session, collect, object_store
from raylight.cluster import session as cluster_session
from raylight.cluster.collect import CANCEL_GRACE_S
from raylight.cluster.config import ServiceSpec, SessionConfig
from raylight.cluster.errors import RunCancelled, WorkerError
from raylight.cluster.object_store import ObjectCache
from raylight.cluster.serialization import SerializedObject
from raylight.parallel.mesh import MeshShape

ROOT = Path(__file__).resolve().parents[2]
SERVICE = ServiceSpec("echo_service:open_service", "settings", (str(ROOT), str(ROOT / "tests" / "support")))


def config(workers: int = 2, **changes: object) -> SessionConfig:
    return SessionConfig(MeshShape(ulysses=workers), "cpu", **changes)


def pids(session: object) -> list[int]:
    return [place.pid for place in session.places.values()]


@pytest.fixture(scope="module", autouse=True)
def end_of_module():
    yield
    active_session.close()
    assert not ray.is_initialized()


def test_rank_zero_answers_and_streams() -> None:
    session = active_session.session(config(), SERVICE)
    events: list = []
    assert session.run(EchoService.count, 5, on_event=events.append) == ("rank 0 of 2", "settings", 5)
    assert events == list(range(5))


def test_an_argument_is_sent_once() -> None:
    session = active_session.session(config(), SERVICE)
    assert session.run(EchoService.same_object, b"x" * 300_000) is True


def test_what_stays_in_the_object_store_is_bounded_by_number_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "put", lambda value: value)
    cache, made = ObjectCache(3, 100), []

    def use(key: str, size: int) -> None:
        tensors = (np.zeros(size - 10, np.uint8),)
        handle = cache.of(key, lambda: made.append(key) or SerializedObject(b"." * 10, tensors))
        assert handle.key == key and handle._reference.nbytes == size

    def is_made(key: str, size: int) -> bool:
        made.clear()
        use(key, size)
        return made == [key]

    assert [is_made(key, 20) for key in "abcab"] == [True, True, True, False, False]
    assert [is_made(key, 20) for key in "dabc"] == [True, False, False, True], "the least recently used has gone"
    assert [is_made("e", 70), is_made("c", 20), is_made("b", 20)] == [True, False, True]
    assert is_made("f", 1000) and not is_made("f", 1000), "the one in use stays"
    assert is_made("c", 20) and is_made("f", 1000)


@pytest.mark.slow
def test_closing_ends_no_process_that_is_not_rays() -> None:
    active_session.close()
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        active_session.session(config(), SERVICE)
        active_session.close()
        time.sleep(1)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_the_session_is_kept_until_its_configuration_changes() -> None:
    first = active_session.session(config(), SERVICE)
    assert active_session.session(config(), SERVICE) is first
    third = active_session.session(config(3), SERVICE)
    assert third is not first and not first.alive and len(third.places) == 3
    _wait_gone(pids(first))


def test_cancel_ends_all_ranks_and_the_next_run_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "CANCEL_GRACE_S", 20.0)  # this machine may be busy
    session = active_session.session(config(), SERVICE)
    asked = threading.Event()
    started = time.monotonic()
    with pytest.raises(RunCancelled):
        session.run(EchoService.count_slowly, 1000, on_event=lambda _: asked.set(), wants_cancel=asked.is_set)
    assert time.monotonic() - started < 40, "all steps take 50 s"
    assert session.alive
    assert session.run(EchoService.count, 1)[2] == 1


def test_workers_stay_where_a_long_step_ends_before_its_result_is_here() -> None:
    session = active_session.session(config(), SERVICE)
    asked = threading.Event()
    with pytest.raises(RunCancelled):
        session.run(
            EchoService.finish_step_late,
            CANCEL_GRACE_S + 0.5,
            0.2 * CANCEL_GRACE_S,
            on_event=lambda _: asked.set(),
            wants_cancel=asked.is_set,
        )
    assert session.alive


def test_an_interrupt_from_the_listener_passes_after_all_ranks_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "CANCEL_GRACE_S", 20.0)  # this machine may be busy
    session = active_session.session(config(), SERVICE)

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.run(EchoService.count_slowly, 1000, on_event=stop)
    assert session.run(EchoService.count, 1)[2] == 1


@pytest.mark.parametrize(
    "within",
    [
        lambda session: session.run(EchoService.count, 1),
        lambda _: active_session.session(config(), SERVICE),
        lambda _: active_session.session(config(3), SERVICE),
    ],
    ids=["a run", "its session", "another session"],
)
def test_a_run_from_within_a_step_of_a_run_is_refused(within: Callable) -> None:
    session = active_session.session(config(), SERVICE)
    with pytest.raises(RuntimeError, match=r"uses the workers from within a step of their run.* Remove the node"):
        session.run(EchoService.count, 2, on_event=lambda _: within(session))
    assert active_session.session(config(), SERVICE) is session
    assert session.run(EchoService.count, 1)[2] == 1


def test_a_wait_for_the_run_of_another_thread_can_be_cancelled() -> None:
    session, asks = active_session.session(config(), SERVICE), []
    with ThreadPoolExecutor(1) as pool, session._running:
        waiting = pool.submit(session.run, EchoService.count, 1, wants_cancel=lambda: asks.append(1) or len(asks) > 2)
        with pytest.raises(RunCancelled):
            waiting.result(timeout=30)
    assert session.run(EchoService.count, 1)[2] == 1


@pytest.mark.parametrize("verb", [EchoService.refuse, EchoService.refuse_in_own_time])
def test_a_refusal_by_all_ranks_is_raised_as_it_is(verb: Callable) -> None:
    session = active_session.session(config(), SERVICE)
    with pytest.raises(ValueError, match=r"^no such thing$"):
        session.run(verb)
    assert session.alive


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        (
            EchoService.fail_alone,
            r"rank 1 \(cpu, pid \d+ on 127.0.0.1\) failed while beginning to fail_alone: "
            r"RuntimeError: rank 1 is unwell",
        ),
        (
            EchoService.die_alone,
            r"rank 1 \(cpu, pid \d+ on 127.0.0.1\) died while beginning to die_alone: its process ended",
        ),
    ],
)
def test_a_failing_rank_is_named_and_the_next_session_works(verb: Callable, message: str) -> None:
    session = active_session.session(config(), SERVICE)
    started = time.monotonic()
    with pytest.raises(WorkerError, match=message):
        session.run(verb)
    assert time.monotonic() - started < 60, "the others wait for minutes"
    assert not session.alive
    assert active_session.session(config(), SERVICE).run(EchoService.count, 2)[2] == 2


def test_a_rank_that_dies_just_before_a_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    session = active_session.session(config(), SERVICE)

    def put_late(_: object) -> None:
        """Take until the watchdog has found that a rank has died, and has ended the session."""
        psutil.Process(session.places[1].pid).kill()
        deadline = time.monotonic() + 60
        while not session._closed and time.monotonic() < deadline:
            time.sleep(0.01)

    monkeypatch.setattr(cluster_session, "put", put_late)
    with pytest.raises(WorkerError, match=r"rank 1 .* died while waiting for work"):
        session.run(EchoService.count, 5)


def test_only_loopback_is_listened_on() -> None:
    session = active_session.session(config(), SERVICE)
    ours = {psutil.Process(pid) for pid in pids(session)}
    ours |= {child for child in psutil.Process().children(recursive=True)}
    open_to_all, seen = [], set()
    for process in ours:
        with contextlib.suppress(psutil.Error):  # it has ended
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    seen.add(process.pid)
                    if not _is_loopback(connection.laddr.ip):
                        open_to_all.append((process.pid, process.name(), connection.laddr))
    assert open_to_all == [] and seen >= set(pids(session))


def test_rejects_a_cluster_that_does_not_answer() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"no Ray cluster answers at ray_cluster_address = {address}"):
            active_session.session(config(address=address), SERVICE)


def test_rejects_gpu_select_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="names 1 GPUs .* for 2 workers"):
        config(gpu_select=(0,))
    with pytest.raises(ValueError, match="names a GPU twice"):
        config(gpu_select=(1, 1))
    with pytest.raises(ValueError, match="local only"):
        config(gpu_select=(0, 1), address="10.0.0.1:6379")


@pytest.mark.slow
def test_a_running_cluster_is_joined_and_left_alone() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray_command = Path(sys.executable).with_name("ray")
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64, "PYTHONPATH": ""}
    environment.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", None)
    head = subprocess.Popen(
        [
            ray_command,
            "start",
            "--head",
            "--block",
            "--port",
            str(port),
            "--num-cpus",
            "2",
            "--disable-usage-stats",
            "--include-dashboard",
            "false",
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        address = next(line for line in head.stdout if "Local node IP" in line)
        host = re.search(r"\d+\.\d+\.\d+\.\d+", address).group()
        code = (
            "import sys; sys.path[:0] = sys.argv[1:3]\n"
            "import echo_service\n"
            "from raylight.cluster import active_session\n"
            "from raylight.cluster.config import ServiceSpec, SessionConfig\n"
            "from raylight.parallel.mesh import MeshShape\n"
            "service = ServiceSpec('echo_service:open_service', None, tuple(sys.argv[1:3]))\n"
            "config = SessionConfig(MeshShape(ulysses=2), 'cpu', address=sys.argv[3], start_timeout_s=180)\n"
            "print(active_session.session(config, service).run(echo_service.EchoService.count, 3)[0])\n"
            "active_session.close()\n"
        )
        for _ in range(2):
            driver = subprocess.run(
                [sys.executable, "-c", code, str(ROOT), str(ROOT / "tests" / "support"), f"{host}:{port}"],
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert driver.stdout.splitlines()[-1:] == ["rank 0 of 2"], driver.stderr
        assert head.poll() is None
    finally:
        child_process_ids = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        head.wait(timeout=60)
        for process in psutil.wait_procs(child_process_ids, timeout=20)[1]:
            process.kill()


@pytest.mark.parametrize("how", [pytest.param("ends", marks=pytest.mark.slow), "is killed"])
def test_nothing_is_left_when_the_driver(how: str, tmp_path: Path) -> None:
    home, errors = tmp_path / "home", tmp_path / "errors"
    home.mkdir()
    code = (
        "import sys, time; sys.path[:0] = sys.argv[1:3]\n"
        "import echo_service\n"
        "from raylight.cluster import active_session\n"
        "from raylight.cluster.config import ServiceSpec, SessionConfig\n"
        "from raylight.parallel.mesh import MeshShape\n"
        "service = ServiceSpec('echo_service:open_service', None, tuple(sys.argv[1:3]))\n"
        "session = active_session.session(SessionConfig(MeshShape(ulysses=2), 'cpu'), service)\n"
        "print(*[place.pid for place in session.places.values()], flush=True)\n"
        "time.sleep(float(sys.argv[3]))\n"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT), str(ROOT / "tests" / "support"), "0" if how == "ends" else "600"],
        stdout=subprocess.PIPE,
        stderr=errors.open("w"),
        text=True,
        env={**os.environ, "PYTHONPATH": "", "HOME": str(home)},
    )
    started = [int(pid) for pid in driver.stdout.readline().split()]
    child_process_ids = started + [child.pid for child in psutil.Process(driver.pid).children(recursive=True)]
    assert len(started) == 2 and len(child_process_ids) > 4, errors.read_text()
    if how == "is killed":
        driver.kill()
    driver.wait(timeout=120)
    _wait_gone(child_process_ids)
    assert not list(home.iterdir()), "nothing is left in the home either"


def _is_loopback(text: str) -> bool:
    address = ipaddress.ip_address(text)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _wait_gone(processes: list[int], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while (left := [pid for pid in processes if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
