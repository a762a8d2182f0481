"""The one session of this process. GPUs have one owner, so a new configuration replaces the old one.

Workers start in a thread. `begin` returns at once, and `session` waits for them.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable

from .config import ServiceSpec, SessionConfig
from .diagnosis import Remedies, no_remedies
from .ray_runtime import RUNTIME
from .session import Session
from .starting import RayStart, Start

logger = logging.getLogger(__name__)

_EXIT_S = 5.0

_lock = threading.Lock()  # held while workers are changed or waited for
_session: Session | None = None
_start: Start | None = None  # of the next session
_exits = False


def begin(config: SessionConfig, service: ServiceSpec, remedies: Remedies = no_remedies, replace: bool = True) -> None:
    """Start workers of this configuration in the background, unless they run or start already.

    Does nothing while another thread waits for workers, nor, without `replace`, where there are any. An error is raised
    by `session`; one of an earlier start is forgotten.
    """
    global _start
    if _lock.acquire(blocking=False):
        try:
            if _start is not None and _start.error is not None:
                _take_over()
            has_workers = running() is not None or (_start is not None and _start.has_workers)
            if replace or not has_workers:
                _ensure(config, service, remedies)
        finally:
            _lock.release()


def begin_ray(config: SessionConfig, service: ServiceSpec) -> None:
    """Start Ray on this machine in the background, for workers of this configuration that may be wanted soon.

    Does nothing for a cluster, nor where there are or were workers. `session` meets the errors again, and raises them.
    """
    global _start
    if config.is_local and _lock.acquire(blocking=False):
        try:
            if _start is None and _session is None:
                _end_at_exit()
                _start = RayStart(config, service, no_remedies, None, None, lambda _: None)
        finally:
            _lock.release()


def session(
    config: SessionConfig,
    service: ServiceSpec,
    wants_cancel: Callable[[], bool] = lambda: False,
    remedies: Remedies = no_remedies,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Session:
    """Return the running session if it has this configuration or can take it, else wait for a new one.

    `on_progress` gets what the start is doing, in this thread. Raises as `Session` and `Session.reshape`, what a start
    in the background has raised once. Raises RunCancelled: when cancelled; the start goes on. Raises RuntimeError: when
    called by the events of a run, whose workers it might end.
    """
    global _session, _start
    with _lock:
        if _session is not None:
            _session.refuse_within_step()
        _ensure(config, service, remedies)
        if _start is not None:
            try:
                _start.wait(wants_cancel, on_progress)
            finally:
                if _start.ended:
                    _take_over()
        assert _session is not None, "it has started"
        decided = config.as_in(_session.config)
        if _session.config != decided:
            _session.reshape(decided, remedies, wants_cancel)
        _session.asked = config
        return _session


def running() -> Session | None:
    """Return the running session, if any. Does not wait for one that is starting."""
    start = _start
    found = _session if start is None else start.left
    return found if found is not None and found.alive else None


def close(keep_ray: bool = False) -> None:
    """End the running session, and Ray too unless `keep_ray`. A Ray of another pack stays."""
    global _session, _start
    with _lock:
        if _start is not None:
            _start.cancel()
            _start.settle()
            _take_over()
        if _session is not None:
            _session.close()
            keep_ray = keep_ray and RUNTIME.serves(_session.config)
            _session = None
        if not keep_ray:
            RUNTIME.disconnect()


def _ensure(config: SessionConfig, service: ServiceSpec, remedies: Remedies) -> None:
    """Have a session that can take a configuration, or a start of one. The caller holds the lock."""
    global _session, _start
    if _start is not None and (_start.session is not None or (_start.error is not None and _start.config != config)):
        _take_over()
    if _start is not None:
        fits = _start.has_workers and (
            _start.config == config or (not config.is_open and _start.config.can_become(config))
        )
        if not fits:
            _replace(config, service, remedies)
    elif _session is None or not _session.can_take(config):
        _replace(config, service, remedies)


def _replace(config: SessionConfig, service: ServiceSpec, remedies: Remedies) -> None:
    global _session, _start
    if _start is None and _session is None:
        _end_at_exit()
    if _start is not None:
        _start.cancel()
    _start = Start(config, service, remedies, _start, _session, _restart)
    _session = None


def _take_over() -> None:
    """Have what a start that has ended has left: its session, or the one before it, if that goes on."""
    global _session, _start
    assert _start is not None, "there is a start"
    _session, _start = _start.left, None


def _end_at_exit() -> None:
    atexit.unregister(_exit)
    atexit.register(_exit)  # before Ray's own: a call after that would start another Ray


def _restart(failed: Session) -> None:
    """Start new workers in the place of those that a failure has ended.

    Not where they had done nothing yet: then it would go on like that for ever.
    """
    if not failed.has_worked or _exits or not threading.main_thread().is_alive():
        return
    if _lock.acquire(blocking=False):
        try:
            if _session is failed:
                logger.info("new workers start in the background")
                _replace(failed.asked, failed.service, failed.remedies)
        finally:
            _lock.release()


def _exit() -> None:
    """End a start that goes on when this process exits, and the process that workers are forked from: the guard, which
    removes Ray's files, waits for it.
    """
    global _exits
    _exits = True
    start = _start
    if start is not None:
        start.cancel()
        start.settle(_EXIT_S)
    RUNTIME.end_fork_server()
