"""Two machines with Ray, and ComfyUI's process on the first. One cluster for all tests here: a start takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import machines
import pytest
from cluster_user import ClusterUser


@pytest.fixture(scope="package")
def user() -> Iterator[ClusterUser]:
    if why := machines.why_not():
        pytest.skip(f"no machines: {why}")
    cluster = machines.FakeCluster()
    try:
        running = ClusterUser(cluster)
        try:
            yield running
        finally:
            running.close()
    finally:
        cluster.end()


@pytest.fixture(autouse=True)
def log_of_a_failure(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "user" in request.fixturenames:
        sys.stdout.write("the driver's log:\n" + request.getfixturevalue("user").cluster.log()[-6000:])
