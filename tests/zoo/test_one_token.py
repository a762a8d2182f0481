"""The parity matrix for prompts and images of fewer tokens than ranks: a stream of one token in every family."""

from __future__ import annotations

import functools

import pytest
from matrix_cases import Comparison, compare
from one_token_cases import PICTURE, calls_of

from raylight.dev.local_ranks import run_ranks, values
from raylight.dev.zoo import families
from raylight.parallel.mesh import MeshShape

TOLERANCE = 1e-4
MESHES = {
    "Ulysses 2": MeshShape(ulysses=2),
    "ring 2": MeshShape(ring=2),
    "Ulysses 4": MeshShape(ulysses=4),
    "ring 4": MeshShape(ring=4),
    "Ulysses 2 x ring 2": MeshShape(ulysses=2, ring=2),
}
QUICK = ("Wan T2V", "Flux Schnell", "Qwen Image")  # on all meshes; the others on `OF_ALL`
# Each exchange by itself, and both together on ranks of which three have no token of a stream.
OF_ALL = ("Ulysses 2", "ring 2", "Ulysses 2 x ring 2")
CALLS = [(family.name, call) for family in families().values() for call in calls_of(family)]


@functools.cache
def measured(world: int, of_all: bool) -> list[dict[tuple[str, str, str], Comparison]]:
    """Measure all families on all meshes of a size at once, or only the quick ones: ranks start once."""
    shapes = {name: shape for name, shape in MESHES.items() if shape.world_size == world and (name in OF_ALL) == of_all}
    names = tuple(families()) if of_all else QUICK
    return values(run_ranks(world, compare, names, shapes, calls_of, timeout_s=1500))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the first test of a world size waits for all of that size
@pytest.mark.parametrize(
    ("mesh", "family", "call"),
    [(mesh, family, call) for mesh in MESHES for family, call in CALLS if mesh in OF_ALL or family in QUICK],
)
def test_parity(mesh: str, family: str, call: str, report_parity) -> None:
    ranks = [rank[family, call, mesh] for rank in measured(MESHES[mesh].world_size, mesh in OF_ALL)]
    failures = {rank.failure for rank in ranks if rank.failure}
    assert not failures, "\n".join(sorted(failures))
    worst = max(rank.error for rank in ranks)
    report_parity(f"{family + ', ' + call:<60} {mesh:<18}   max error {worst:.1e} of the standard deviation")
    assert worst <= TOLERANCE
    for rank in ranks:
        assert rank.std > 1e-3
        assert rank.exchanged > 0
        # With one token of each stream, a rank may have half of all tokens.
        assert call == PICTURE or rank.largest_share <= 1.6 / MESHES[mesh].world_size


def test_every_family_has_a_text_or_condition_of_one_token() -> None:
    assert {family for family, _ in CALLS} == set(families())
