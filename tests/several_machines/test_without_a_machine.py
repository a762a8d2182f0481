"""A machine goes away within a run: the error names it soon, and the next run works without it, if it may."""

from __future__ import annotations

import time

import pytest
from cluster_user import ClusterUser

pytestmark = pytest.mark.slow
LIMIT_S = 10


@pytest.mark.parametrize("how", ["its cable is pulled", "it is switched off"])
def test_the_next_run_works_on_what_is_left(how: str, user: ClusterUser) -> None:
    cluster = user.cluster
    user.sample([1, 1, 2])
    user.begin_long()
    began = time.monotonic()
    if how == "it is switched off":
        cluster.beta.end()
    else:
        cluster.cut()
    error, took_s = user.end()["error"], time.monotonic() - began
    assert "WorkerError: the machine beta (10.77.0.2) does not answer any more, where rank 1 ran" in error
    assert took_s < LIMIT_S
    user.assert_same(user.sample_on_all())
    assert [place.partition(" (")[0] for place in user.ask("places")["answer"]] == ["rank 0"]
    cluster.replace_beta()
    user.ask("close")
    user.assert_same(user.sample_on_all())
    assert len(user.ask("places")["answer"]) == 2


def test_rejects_more_workers_than_are_left(user: ClusterUser) -> None:
    user.cluster.beta.end()
    user.ask("close")
    error = user.ask("sample", "Wan T2V", path=user.path, mesh=[1, 1, 2])["error"]
    assert "2 workers need 1 CPU each, and the cluster has room for 1" in error
    assert "alpha (10.77.0.1) has 1 CPU free" in error
