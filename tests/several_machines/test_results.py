"""Workers on two machines give what one ComfyUI gives."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cluster_user import CASE, ClusterUser
from comfy_cases import CASES, checkpoint

pytestmark = pytest.mark.slow
EQUAL = [11, 11]  # prompts of one length, which ComfyUI computes as one batch


@pytest.fixture(scope="module")
def second_file(user: ClusterUser) -> Path:
    """Return another model file of alpha."""
    return checkpoint(user.file.parent, CASES[CASE], seed=1)


@pytest.mark.parametrize(
    ("what", "mesh", "options"),
    [
        ("ulysses 2", [1, 1, 2], {}),
        ("ring 2", [1, 2, 1], {}),
        ("cfg 2", [2, 1, 1], {"tokens": EQUAL}),
        ("degrees by the run, two rows", [1, 1, 2], {"tokens": EQUAL, "by_run": True}),
        ("FSDP", [1, 1, 2], {"sharding": "sharded"}),
        ("FSDP, offloaded, cfg 2", [2, 1, 1], {"sharding": "offloaded", "tokens": EQUAL}),
    ],
)
def test_parity(what: str, mesh: list[int], options: dict[str, Any], user: ClusterUser, report_parity: Any) -> None:
    error = user.assert_same(user.sample(mesh, **options), options.get("tokens"))
    report_parity(f"two machines, {what:<34} max error {error:.1e} of the standard deviation")
    first, second = user.ask("places")["answer"]
    assert "on alpha, 10.77.0.1" in first and "on beta, 10.77.0.2" in second


def test_the_status_names_machines(user: ClusterUser) -> None:
    user.sample([1, 1, 2])
    text = user.ask("status")["answer"]
    assert "rank 1 (cpu, pid" in text and "on beta, 10.77.0.2" in text
    assert "holds wan-t2v" in text
    assert "GB/s" in text


def test_the_file_was_sent_once(user: ClusterUser) -> None:
    user.sample([1, 1, 2])
    assert [path.read_bytes() for path in user.sent_to_beta(user.file.name)] == [user.file.read_bytes()]
    assert user.cluster.log().count(f"{user.file.name} is not there on beta") == 1
    assert not (user.cluster.alpha.folder / ".cache" / "raylight").exists()


def test_a_file_in_a_model_folder_there_is_not_sent(user: ClusterUser, second_file: Path) -> None:
    cluster = user.cluster
    shutil.copy(second_file, cluster.beta.folder / cluster.beta.models)
    path = str(cluster.alpha.here / cluster.alpha.models / second_file.name)
    assert "answer" in user.ask("sample", CASE, path=path, mesh=[1, 1, 2])
    assert not user.sent_to_beta(second_file.name)


def test_rejects_another_file_of_that_name(user: ClusterUser, second_file: Path) -> None:
    cluster = user.cluster
    other = cluster.beta.folder / cluster.beta.models / "third.safetensors"
    shutil.copy(second_file, other)
    shutil.copy(user.file, cluster.alpha.folder / cluster.alpha.models / other.name)
    before = user.ask("places")
    path = str(cluster.alpha.here / cluster.alpha.models / other.name)
    error = user.ask("sample", CASE, path=path, mesh=[1, 1, 2])["error"]
    there = cluster.beta.here / cluster.beta.models / other.name
    assert error.startswith(f"ValueError: third.safetensors on the machine beta is another file: {there} has")
    user.assert_same(user.sample([1, 1, 2]))
    assert user.ask("places")["answer"] == before["answer"], "the workers stay"


def test_a_cancel_reaches_all_machines(user: ClusterUser) -> None:
    user.sample([1, 1, 2])
    before = user.ask("places")
    user.begin_long()
    user.interrupt()
    began = time.monotonic()
    assert "InterruptProcessingException" in user.end()["error"]
    assert time.monotonic() - began < 30, "the whole run takes minutes"
    user.assert_same(user.sample([1, 1, 2]))
    assert user.ask("places")["answer"] == before["answer"], "the workers stay"


def test_another_token_is_not_let_in(user: ClusterUser) -> None:
    code = (
        "import ray, sys\n"
        "try: ray.init(address=sys.argv[1], logging_level='ERROR')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "else: print('let in')\n"
    )
    answer = user.cluster.beta.run(sys.executable, "-c", code, user.cluster.address, RAY_AUTH_TOKEN="b" * 64)
    assert "let in" not in answer and "uthentication" in answer
