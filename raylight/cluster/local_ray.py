"""Starting a Ray of one's own, or joining a running cluster."""

from __future__ import annotations

import logging
import os
import socket
import subprocess

import ray
from ray._private import ray_constants

from . import reaper
from .config import SessionConfig

logger = logging.getLogger(__name__)

_ours = False
_guard: subprocess.Popen | None = None
_not_rays: frozenset[str] = frozenset()  # what ComfyUI and other packs had started before


def connect(config: SessionConfig) -> None:
    """Have Ray up for this session; keeps what is already up in this process.

    Raises ConnectionError when the cluster at `config.address` does not answer.
    """
    global _ours, _not_rays
    if ray.is_initialized():
        return
    _ours = True
    _not_rays = reaper.family()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _bind_to_loopback(config.is_local)
    if config.is_local:
        logger.info("starting Ray on this machine for %d workers", config.world_size)
        ray.init(
            address="local",
            include_dashboard=False,
            namespace=config.namespace,
            num_cpus=max(config.world_size, os.cpu_count() or 1),
            object_store_memory=config.object_store_bytes,
            logging_level=logging.ERROR,  # its warnings at the start are about settings that are chosen here
        )
        return
    logger.info("joining the Ray cluster at %s", config.address)
    try:
        _knock(config.address)
        ray.init(address=config.address, namespace=config.namespace, logging_level=logging.WARNING)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConnectionError(
            f"no Ray cluster answers at ray_cluster_address = {config.address}: {error}. "
            "Start one there with `ray start --head`, or use local. If the cluster asks for a token, start ComfyUI "
            "with RAY_AUTH_MODE=token and the cluster's token in RAY_AUTH_TOKEN."
        ) from error


def _knock(address: str) -> None:
    """Raises OSError at once where nobody listens; Ray would try for minutes."""
    host, separator, port = address.rpartition(":")
    if separator and port.isdigit() and "//" not in address:
        socket.create_connection((host, int(port)), timeout=5).close()


def _bind_to_loopback(local: bool) -> None:
    """Have Ray's processes listen on the loopback interface only, or, for a cluster, on the machine's address.

    `ray.init` replaces a loopback address by the machine's own; this switch of Ray's is the one way around.
    The variable is for the processes that Ray starts, the constant for this one, which has read it already.
    """
    if not hasattr(ray_constants, "ENABLE_RAY_CLUSTER"):
        raise RuntimeError(f"Ray {ray.__version__} cannot be kept on the loopback interface: install another version")
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0" if local else "1"
    ray_constants.ENABLE_RAY_CLUSTER = not local


def disconnect() -> None:
    """Leave Ray, and end it where it is a Ray of our own. Leaves alone what another pack has started."""
    global _ours, _guard
    if _ours and ray.is_initialized():
        ray.shutdown()
    _ours = False
    if _guard is not None:
        _guard.stdin.close()
        _guard.wait(timeout=30)
        _guard = None


def guard() -> None:
    """Have everything that the local Ray has started by now end with this process, even when it is killed."""
    global _guard
    if _ours and _guard is None:
        _guard = reaper.guard(_not_rays)


def has_room(config: SessionConfig) -> bool:
    """Whether the local Ray that is up was started with enough processors for this session."""
    return ray.is_initialized() and ray.cluster_resources().get("CPU", 0) >= config.world_size


def loopback_interface() -> str | None:
    """The name of this machine's loopback interface, for sockets that must not leave it."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
