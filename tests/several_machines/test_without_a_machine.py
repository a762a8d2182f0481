"""A machine goes away within a run: the error names it soon, and the next run works without it, if it may. The last
test here leaves one machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from cluster_user import ClusterUser

pytestmark = pytest.mark.slow
LIMIT_S = 10  # as promised; Ray itself takes half a minute or more


def lose_beta(user: ClusterUser, lose: Callable[[], None]) -> None:
    """Lose beta within a run. Assert that its error tells so soon, and that the next run works on alpha alone."""
    user.sample([1, 1, 2])
    user.begin_long()
    began = time.monotonic()
    lose()
    error, took_s = user.end()["error"], time.monotonic() - began
    assert "WorkerError: the machine beta (10.77.0.2) does not answer any more, where rank 1 ran" in error
    assert took_s < LIMIT_S
    user.assert_same(user.sample_on_all())
    assert [place.partition(" (")[0] for place in user.ask("places")["answer"]] == ["rank 0"]


def test_a_machine_whose_cable_is_pulled(user: ClusterUser) -> None:
    lose_beta(user, user.cluster.cut)
    user.cluster.replace_beta()
    user.ask("close")
    user.assert_same(user.sample_on_all())
    assert len(user.ask("places")["answer"]) == 2, "one that comes back is used"


def test_a_machine_that_is_switched_off(user: ClusterUser) -> None:
    lose_beta(user, lambda: user.cluster.beta.end())
    user.ask("close")
    error = user.ask("sample", "Wan T2V", path=user.path, mesh=[1, 1, 2])["error"]
    assert "2 workers need 1 CPU each, and the cluster has room for 1" in error
    assert "alpha (10.77.0.1) has 1 CPU free" in error
