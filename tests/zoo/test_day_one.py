"""Families with their plans taken away: none has a wrong output, and drafts find what they found before."""

from __future__ import annotations

import functools

import pytest

from raylight.dev.zoo import families
from raylight.dev.zoo.day_one.measure import BY_ROWS, PATCHED, SPLIT, WHOLE, WRONG, DayOne, measure, outcomes

# What is particular to each, in order: two lists of blocks, patches of nodes; a grid of tokens; refiners before the
# blocks; blocks that take turns; keys of another modality; other text in each block; positions counted in tokens.
SAMPLE = ("Flux Schnell", "Cosmos T2V", "Z-Image", "Wan VACE", "LTX-2", "HiDream", "Krea 2", "Mochi", "Stable Audio 3")
# Which drafts do not get right: (family, situation) by what is done instead.
DECLINED = {
    ("LTX-2", "timestep per frame"): WHOLE,
    ("LTX-2", "timestep per token"): WHOLE,
    ("Mochi", "padded prompt"): WHOLE,
    ("Stable Audio 3", "text, batch of two"): BY_ROWS,
}
SITUATIONS = [(name, call) for name in SAMPLE if name in families() for call in families()[name].calls]


@functools.cache
def measured() -> dict[tuple[str, str], list[DayOne]]:
    """Measure the sample, on ranks whose numbers of tokens differ."""
    return measure([name for name in SAMPLE if name in families()], 2)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("family", "situation"), SITUATIONS)
def test_is_split_or_whole_and_never_wrong(family: str, situation: str, report_parity) -> None:
    ranks = measured()[family, situation]
    failures = {rank.failure for rank in ranks if rank.failure}
    assert not failures, "\n".join(sorted(failures))
    outcome = outcomes({(family, situation): ranks})[family, situation]
    worst = max(rank.error for rank in ranks)
    name = f"{family}, {situation}"
    report_parity(f"{name:<60} without a plan: {outcome:<16} max error {worst:.1e} of the standard deviation")
    assert outcome in (DECLINED.get((family, situation), SPLIT), PATCHED)
    if outcome in (WHOLE, BY_ROWS):
        assert "no plan, and none could be drafted" in " ".join(ranks[0].said)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_family_is_wrong_on_three_workers() -> None:
    found = outcomes(measure(list(families()), 3))
    first = [found[name, next(iter(family.calls))] for name, family in families().items()]
    assert WRONG not in found.values(), [key for key, outcome in found.items() if outcome == WRONG]
    assert first.count(SPLIT) >= 0.9 * len(first)
