"""The one session of this process. GPUs have one owner, so a new configuration replaces the old one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from .config import ServiceSpec, SessionConfig
from .diagnosis import Remedies, no_remedies
from .ray_runtime import RUNTIME
from .session import Session

logger = logging.getLogger(__name__)

_lock = threading.Lock()
_session: Session | None = None


def session(
    config: SessionConfig,
    service: ServiceSpec,
    wants_cancel: Callable[[], bool] = lambda: False,
    remedies: Remedies = no_remedies,
) -> Session:
    """Return the running session if it has this configuration, else start a new one. Raises as `Session`."""
    global _session
    with _lock:
        if _session is not None and (_session.config != config or not _session.alive):
            if _session.alive:
                logger.info("the workers restart: their configuration has changed")
            _stop(_session, config)
            _session = None
        if _session is None:
            _session = Session(config, service, wants_cancel, remedies)
        return _session


def running() -> Session | None:
    """Return the running session, if any. Does not wait for one that is starting."""
    found = _session
    return found if found is not None and found.alive else None


def close(keep_ray: bool = False) -> None:
    """End the running session, and Ray too unless `keep_ray`. A Ray of another pack stays."""
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
