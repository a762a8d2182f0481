"""The parity matrix: every family, every situation, on 2 to 4 ranks of Ulysses, ring and both, against ComfyUI in one
process.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from matrix_cases import Comparison, compare

from raylight.dev.local_ranks import run_ranks, values
from raylight.dev.setup.comfyui import DEFAULT_VERSION
from raylight.dev.zoo import families
from raylight.dev.zoo.day_one.measure import measure, outcomes
from raylight.dev.zoo.table import render
from raylight.driver.preflight import running
from raylight.parallel.mesh import MeshShape

TOLERANCE = 1e-4
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "models.md"
MESHES = {
    "Ulysses 2": MeshShape(ulysses=2),
    "Ulysses 3": MeshShape(ulysses=3),
    "Ulysses 4": MeshShape(ulysses=4),
    "ring 3": MeshShape(ring=3),
    "Ulysses 2 x ring 2": MeshShape(ulysses=2, ring=2),
}

CALLS = [(family.name, call) for family in families().values() for call in family.calls]


@functools.cache
def measured(world: int) -> list[dict[tuple[str, str, str], Comparison]]:
    """Measure all meshes of a size at once: ranks start once, and models are built and run in one process once."""
    shapes = {name: shape for name, shape in MESHES.items() if shape.world_size == world}
    return values(run_ranks(world, compare, tuple(families()), shapes, timeout_s=1500))


def ranks_of(family: str, call: str, mesh: str) -> list[Comparison]:
    return [rank[family, call, mesh] for rank in measured(MESHES[mesh].world_size)]


@pytest.mark.timeout(1800)  # the first test of a world size waits for all of that size
@pytest.mark.parametrize(
    "mesh",
    [pytest.param(mesh, marks=[pytest.mark.slow] if shape.world_size > 3 else []) for mesh, shape in MESHES.items()],
)
@pytest.mark.parametrize(("family", "call"), CALLS)
def test_parity(family: str, call: str, mesh: str, report_parity) -> None:
    ranks = ranks_of(family, call, mesh)
    failures = {rank.failure for rank in ranks if rank.failure}
    assert not failures, "\n".join(sorted(failures))
    worst = max(rank.error for rank in ranks)
    report_parity(f"{family + ', ' + call:<60} {mesh:<18}   max error {worst:.1e} of the standard deviation")
    assert worst <= TOLERANCE
    for rank in ranks:
        assert rank.std > 1e-3
        # A plan that silently gathers would attend over all tokens or all heads on every rank.
        assert rank.exchanged > 0
        assert rank.largest_share <= 1.5 / MESHES[mesh].world_size
        assert rank.heads <= -(-rank.of // MESHES[mesh].ulysses)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(running() != DEFAULT_VERSION, reason=f"docs/models.md is about ComfyUI {DEFAULT_VERSION}")
def test_the_document_says_what_was_measured(request: pytest.FixtureRequest) -> None:
    passed: dict[str, list[str]] = {}
    for family, call in CALLS:
        if all(rank.error <= TOLERANCE for mesh in MESHES for rank in ranks_of(family, call, mesh)):
            passed.setdefault(family, []).append(call)
    without_plan = outcomes(measure(list(families()), 2))
    text = render(passed, MESHES, TOLERANCE, without_plan)
    if request.config.getoption("--write-docs"):
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(text)
    assert DOCUMENT.read_text() == text, "run `make models`"
