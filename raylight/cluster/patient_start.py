"""A local Ray that waits for its own processes as long as the start of workers may take.

By itself it gives up after half a minute. On a machine that is busy, with other programs or with its disk, its raylet
may take longer until it has registered itself.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from . import orphan_guard

logger = logging.getLogger(__name__)

_EARLIER_S = 30.0  # than the limit of the whole start, so that Ray says why it has not started
_LOOK_S = 0.2
_USUAL_S = 30.0
_PORT_VARIABLE = "RAY_gcs_server_port_wait_time_s"  # how long Ray waits for its other process


@contextmanager
def patient_start(timeout_s: float) -> Iterator[None]:
    """Have a local Ray that is started within this context wait for its raylet while that runs, for `timeout_s`
    at most.

    Ray looks for its raylet by a function, and counts the time between two calls of it: this makes the first call last.
    """
    from ray._private import services

    before = getattr(services, "get_node", None)
    if before is None:
        logger.debug("this version of Ray may give up its start early on a machine that is busy")
        yield
        return
    limit_s = max(0.0, timeout_s - _EARLIER_S)
    began = time.monotonic()

    def get_node(*arguments: Any, **options: Any) -> Any:
        told = False
        while True:
            try:
                return before(*arguments, **options)
            except RuntimeError:  # it has not registered yet
                waited_s = time.monotonic() - began
                if waited_s > limit_s or not _raylet_runs():
                    raise
                if waited_s > _USUAL_S and not told:
                    told = True
                    logger.warning("Ray is slow to start: this machine is busy, with other programs or with its disk")
            time.sleep(_LOOK_S)

    is_users = _PORT_VARIABLE in os.environ
    os.environ.setdefault(_PORT_VARIABLE, str(round(limit_s)))
    services.get_node = get_node
    try:
        yield
    finally:
        services.get_node = before
        if not is_users:
            os.environ.pop(_PORT_VARIABLE, None)


def _raylet_runs() -> bool:
    children = psutil.Process().children()
    return any(
        orphan_guard.name_of(child).startswith("raylet") and orphan_guard.is_running(child) for child in children
    )
