"""The parity matrices of models and VAEs on ranks of unlike speeds, against ComfyUI in one process."""

from __future__ import annotations

import functools
from operator import attrgetter

import pytest
import vae_split_cases
from matrix_cases import Comparison, compare
from one_token_cases import calls_of

from raylight.dev.local_ranks import run_ranks, values
from raylight.dev.vae_zoo import VAES
from raylight.dev.zoo import families
from raylight.parallel.mesh import MeshShape
from raylight.parallel.partition import divide
from raylight.parallel.shares import Speeds

TOLERANCE = 1e-4
SPEEDS = {2: Speeds((2, 1), (2, 1)), 3: Speeds((3, 1, 2), (3, 1, 2)), 4: Speeds((4, 1, 2, 3), (3, 1, 2, 3))}
MESHES = {
    "Ulysses 2": MeshShape(ulysses=2),
    "ring 2": MeshShape(ring=2),
    "Ulysses 3": MeshShape(ulysses=3),
    "ring 3": MeshShape(ring=3),
    "Ulysses 4": MeshShape(ulysses=4),
    "Ulysses 2 x ring 2": MeshShape(ulysses=2, ring=2),
}
QUICK = ("Wan T2V", "Flux Schnell", "Qwen Image")  # on all meshes; the others are slow tests, on `OF_ALL`
OF_ALL = ("Ulysses 3", "Ulysses 2 x ring 2")
FAMILIES = tuple(families())
CALLS = [(family.name, call) for family in families().values() for call in family.calls]
ONE_TOKEN = [(family.name, call) for family in families().values() for call in calls_of(family)]


@functools.cache
def measured(world: int, names: tuple[str, ...], one_token: bool) -> list[dict[tuple[str, str, str], Comparison]]:
    shapes = {name: shape for name, shape in MESHES.items() if shape.world_size == world}
    which = calls_of if one_token else attrgetter("calls")
    return values(run_ranks(world, compare, names, shapes, which, SPEEDS[world], timeout_s=1500))


def check(mesh: str, family: str, call: str, one_token: bool, report_parity) -> None:
    shape = MESHES[mesh]
    quick = shape.world_size < 4 and family in QUICK and not one_token
    ranks = [rank[family, call, mesh] for rank in measured(shape.world_size, QUICK if quick else FAMILIES, one_token)]
    failures = {rank.failure for rank in ranks if rank.failure}
    assert not failures, "\n".join(sorted(failures))
    worst = max(rank.error for rank in ranks)
    report_parity(f"{family + ', ' + call:<60} {mesh:<18}   unlike {worst:.1e} of the standard deviation")
    assert worst <= TOLERANCE
    for number, rank in enumerate(ranks):
        assert rank.std > 1e-3
        assert rank.exchanged > 0
        if shape.ring == 1:
            assert rank.heads == divide(rank.of, shape.ulysses, SPEEDS[shape.world_size].attention)[number]


def is_slow(mesh: str, family: str) -> bool:
    return MESHES[mesh].world_size > 3 or family not in QUICK


@pytest.mark.timeout(1800)  # the first test of a world size waits for all of that size
@pytest.mark.parametrize(
    ("mesh", "family", "call"),
    [
        pytest.param(mesh, family, call, marks=[pytest.mark.slow] if is_slow(mesh, family) else [])
        for mesh in MESHES
        for family, call in CALLS
        if mesh in OF_ALL or family in QUICK
    ],
)
def test_parity(mesh: str, family: str, call: str, report_parity) -> None:
    check(mesh, family, call, False, report_parity)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mesh", OF_ALL)
@pytest.mark.parametrize(("family", "call"), ONE_TOKEN)
def test_parity_with_one_token(mesh: str, family: str, call: str, report_parity) -> None:
    check(mesh, family, call, True, report_parity)


@functools.cache
def vaes(world: int, names: tuple[str, ...]) -> list[dict[tuple[str, str], vae_split_cases.Comparison]]:
    return values(run_ranks(world, vae_split_cases.compare, names, SPEEDS[world], timeout_s=1200))


@pytest.mark.timeout(1300)
@pytest.mark.parametrize(
    ("name", "world"),
    [
        pytest.param(name, world, marks=[] if world == 2 and index < 3 else [pytest.mark.slow])
        for index, name in enumerate(VAES)
        for world in (2, 3)
    ],
)
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_parity_of_vaes(name: str, direction: str, world: int, report_parity) -> None:
    quick = world == 2 and name in tuple(VAES)[:3]
    ranks = [rank[name, direction] for rank in vaes(world, tuple(VAES)[:3] if quick else tuple(VAES))]
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
