"""The parity matrices of models and VAEs on ranks of unlike speeds, against ComfyUI in one process."""

from __future__ import annotations

import functools
from operator import attrgetter

import pytest
import vae_split_cases
from matrix_cases import Comparison, compare
from one_token_cases import PICTURE, calls_of, every_call

from raylight.dev.local_ranks import run_ranks, values
from raylight.dev.vae_zoo import VAES
from raylight.dev.zoo import families
from raylight.parallel.mesh import MeshShape
from raylight.parallel.partition import divide
from raylight.parallel.shares import Speeds

TOLERANCE = 1e-4
# Of the four, so unlike that every family's heads are divided unevenly between the two places of both Ulysses groups.
SPEEDS = {2: Speeds((2, 1), (2, 1)), 3: Speeds((3, 1, 2), (3, 1, 2)), 4: Speeds((4, 1, 2, 3), (4, 1, 2, 1))}
MESHES = {
    "Ulysses 2": MeshShape(ulysses=2),
    "ring 2": MeshShape(ring=2),
    "Ulysses 3": MeshShape(ulysses=3),
    "ring 3": MeshShape(ring=3),
    "Ulysses 4": MeshShape(ulysses=4),
    "Ulysses 2 x ring 2": MeshShape(ulysses=2, ring=2),
}
QUICK = ("Wan T2V", "Flux Schnell", "Qwen Image")  # on all meshes; the others are slow tests, on `OF_ALL`
OF_ALL = "Ulysses 2 x ring 2"  # both exchanges, so one mesh of all families is enough
CALLS = [(family.name, call) for family in families().values() for call in family.calls]
ONE_TOKEN = [(family.name, call) for family in families().values() for call in calls_of(family)]


@functools.cache
def measured(world: int) -> list[dict[tuple[str, str, str], Comparison]]:
    """Measure the quick families on all meshes of a size but `OF_ALL`."""
    shapes = {name: shape for name, shape in MESHES.items() if shape.world_size == world and name != OF_ALL}
    return values(run_ranks(world, compare, QUICK, shapes, attrgetter("calls"), SPEEDS[world], timeout_s=1500))


@functools.cache
def measured_of_all() -> list[dict[tuple[str, str, str], Comparison]]:
    """Measure all calls of all families on `OF_ALL`."""
    shapes, world = {OF_ALL: MESHES[OF_ALL]}, MESHES[OF_ALL].world_size
    return values(run_ranks(world, compare, tuple(families()), shapes, every_call, SPEEDS[world], timeout_s=1500))


def check(mesh: str, family: str, call: str, report_parity) -> None:
    shape = MESHES[mesh]
    ranks = [rank[family, call, mesh] for rank in (measured_of_all() if mesh == OF_ALL else measured(shape.world_size))]
    failures = {rank.failure for rank in ranks if rank.failure}
    assert not failures, "\n".join(sorted(failures))
    worst = max(rank.error for rank in ranks)
    report_parity(f"{family + ', ' + call:<60} {mesh:<18}   unlike {worst:.1e} of the standard deviation")
    assert worst <= TOLERANCE
    for rank in ranks:
        assert rank.std > 1e-3
        assert rank.exchanged > 0
    attention = SPEEDS[shape.world_size].attention
    # Ranks of one Ulysses group are neighbours, and a ring joins those of the same place.
    of_places = [sum(attention[place :: shape.ulysses]) for place in range(shape.ulysses)]
    for place, heads in enumerate(divide(ranks[0].of, shape.ulysses, of_places)):
        found = {rank.heads for rank in ranks[place :: shape.ulysses]}
        # Of so few tokens a Ulysses group may have none, and attends to nothing.
        assert found == {heads} or (call == PICTURE and found == {heads, 0})


def is_slow(mesh: str, family: str) -> bool:
    return MESHES[mesh].world_size > 3 or family not in QUICK


@pytest.mark.timeout(1800)  # the first test of a world size waits for all of that size
@pytest.mark.parametrize(
    ("mesh", "family", "call"),
    [
        pytest.param(mesh, family, call, marks=[pytest.mark.slow] if is_slow(mesh, family) else [])
        for mesh in MESHES
        for family, call in CALLS
        if mesh == OF_ALL or family in QUICK
    ],
)
def test_parity(mesh: str, family: str, call: str, report_parity) -> None:
    check(mesh, family, call, report_parity)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("family", "call"), ONE_TOKEN)
def test_parity_with_one_token(family: str, call: str, report_parity) -> None:
    check(OF_ALL, family, call, report_parity)


@functools.cache
def vaes(world: int) -> list[dict[tuple[str, str], vae_split_cases.Comparison]]:
    """Measure all VAEs on 3 ranks, where halos are hidden, and the first on 2."""
    names = tuple(VAES)[:3] if world == 2 else tuple(VAES)
    return values(run_ranks(world, vae_split_cases.compare, names, SPEEDS[world], timeout_s=1200))


@pytest.mark.timeout(1300)
@pytest.mark.parametrize(
    ("name", "world"),
    [
        pytest.param(name, world, marks=[] if world == 2 else [pytest.mark.slow])
        for index, name in enumerate(VAES)
        for world in ((2, 3) if index < 3 else (3,))
    ],
)
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_parity_of_vaes(name: str, direction: str, world: int, report_parity) -> None:
    ranks = [rank[name, direction] for rank in vaes(world)]
    failures = {rank.failure for rank in ranks if rank.failure}
    assert not failures, "\n".join(sorted(failures))
    worst = max(rank.error for rank in ranks)
    report_parity(f"{name + ', ' + direction:<42} {world} unlike ranks   {worst:.1e} of the standard deviation")
    assert worst <= TOLERANCE
    rows = [rank.rows[1] - rank.rows[0] for rank in ranks]
    assert sum(rows) == ranks[0].total
    latent = divide(VAES[name].latent[-2], world, SPEEDS[world].products, 2)
    if direction == "decode":
        assert [count * sum(latent) for count in rows[:-1]] == [count * ranks[0].total for count in latent[:-1]]
