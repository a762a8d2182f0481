"""Workers on two machines give what one ComfyUI gives."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from cluster_user import ClusterUser

pytestmark = pytest.mark.slow
TOLERANCE = 1e-4
EQUAL = [11, 11]  # prompts of one length, which ComfyUI computes as one batch


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
    actual, expected = user.sample(mesh, **options), user.stock(options.get("tokens"))
    error = ((actual - expected).abs().max() / expected.std()).item()
    report_parity(f"two machines, {what:<34} max error {error:.1e} of the standard deviation")
    assert error <= TOLERANCE
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
    cached = list((user.cluster.beta.folder / ".cache" / "raylight").iterdir())
    assert [path.read_bytes() for path in cached] == [user.file.read_bytes()]
    assert user.cluster.log().count("is not there on beta") == 1
    assert not (user.cluster.alpha.folder / ".cache" / "raylight").exists()


def test_another_token_is_not_let_in(user: ClusterUser) -> None:
    code = (
        "import ray, sys\n"
        "try: ray.init(address=sys.argv[1], logging_level='ERROR')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "else: print('let in')\n"
    )
    answer = user.cluster.beta.run(sys.executable, "-c", code, user.cluster.address, RAY_AUTH_TOKEN="b" * 64)
    assert "let in" not in answer and "uthentication" in answer
