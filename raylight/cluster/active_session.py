"""The one session of this process: GPUs have one owner, so a new configuration replaces the old."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from .config import ServiceSpec, SessionConfig
from .ray_runtime import RUNTIME
from .session import Session

logger = logging.getLogger(__name__)

_lock = threading.Lock()
_session: Session | None = None


def session(config: SessionConfig, service: ServiceSpec, wants_cancel: Callable[[], bool] = lambda: False) -> Session:
    """The session of `config`: the running one if it is of this configuration and alive, else a new one.

    Raises what `Session` raises."""
    global _session
    with _lock:
        if _session is not None and (_session.config != config or not _session.alive):
            if _session.alive:
                logger.info("the workers are started anew: their configuration has changed")
            _stop(_session, config)
            _session = None
        if _session is None:
            _session = Session(config, service, wants_cancel)
        return _session


def running() -> Session | None:
    """The session that is running, if one is."""
    with _lock:
        return _session if _session is not None and _session.alive else None


def peek() -> Session | None:
    """The session, alive or not, without waiting for one that is being started; for looking only."""
    return _session


def close(keep_ray: bool = False) -> None:
    """End the running session and, if it is ours and not to be kept, Ray."""
    global _session
    with _lock:
        if _session is not None:
            _stop(_session, _session.config if keep_ray else None)
            _session = None
        elif not keep_ray:
            RUNTIME.disconnect()


def _stop(old: Session, successor: SessionConfig | None) -> None:
    old.close()
    keeps_ray = (
        successor is not None
        and old.config.is_local
        and successor.is_local
        and successor.namespace == old.config.namespace
        and successor.object_store_bytes == old.config.object_store_bytes
        and RUNTIME.has_room(successor)
    )
    if not keeps_ray:
        RUNTIME.disconnect()
