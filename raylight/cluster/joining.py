"""Joining a Ray cluster that runs already."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from .config import SessionConfig
from .reachability import check_reachable

logger = logging.getLogger(__name__)


def check_cluster(config: SessionConfig) -> None:
    """Check that the cluster of a configuration answers, if it has one. Raises ConnectionError: when it does not."""
    if not config.is_local:
        with _naming_cluster(config):
            check_reachable(config.address)


def join_cluster(config: SessionConfig) -> None:
    """Join the cluster of a configuration. Raises ConnectionError: when it does not answer, or let this process in."""
    logger.info("joining the Ray cluster at %s", config.address)
    check_cluster(config)
    with _naming_cluster(config):
        ray.init(address=config.address, namespace=config.namespace, log_to_driver=False, logging_level=logging.WARNING)


@contextmanager
def _naming_cluster(config: SessionConfig) -> Iterator[None]:
    """Raise what is met within as ConnectionError, with the cluster's address and what to do."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise ConnectionError(
            f"no Ray cluster answers at ray_cluster_address = {config.address}: {error}. "
            "Start one there with `python -m raylight.cluster.node --head` (docs/cluster.md), or use local. If the "
            "cluster asks for a token, it must be in ~/.ray/auth_token here, or in RAY_AUTH_TOKEN of ComfyUI."
        ) from error
