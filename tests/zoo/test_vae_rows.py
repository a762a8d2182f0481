"""The matrix of VAEs: every class, decode and encode, split by rows over 2 to 4 ranks, against ComfyUI's own."""

from __future__ import annotations

import functools
from itertools import pairwise

import pytest
from vae_split_cases import Comparison, compare, compare_with_other_memory

from raylight.dev.local_ranks import run_ranks, values
from raylight.dev.vae_zoo import VAES

TOLERANCE = 1e-4
# Of a rank's rows beside its own: halos, and the rows of a latent that do not divide by a stride.
HALO_SHARE = 0.09
CASES = [(name, direction) for name in VAES for direction in ("decode", "encode")]


@functools.cache
def measured(world: int) -> list[dict[tuple[str, str], Comparison]]:
    """Measure all VAEs on as many ranks at once."""
    return values(run_ranks(world, compare, tuple(VAES), timeout_s=1200, collective_timeout_s=300))


@pytest.mark.timeout(1300)  # the first test of a world size waits for all of that size
@pytest.mark.parametrize("world", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "direction"), CASES)
def test_parity(name: str, direction: str, world: int, report_parity) -> None:
    ranks = [rank[name, direction] for rank in measured(world)]
    failures = {rank.failure for rank in ranks if rank.failure}
    assert not failures, "\n".join(sorted(failures))
    worst = max(rank.error for rank in ranks)
    report_parity(f"{name + ', ' + direction:<42} {world} ranks   max error {worst:.1e} of the standard deviation")
    assert worst <= TOLERANCE
    # The ranks' rows are the whole, each once.
    assert ranks[0].rows[0] == 0
    assert ranks[-1].rows[1] == ranks[0].total
    assert all(above.rows[1] == below.rows[0] for above, below in pairwise(ranks))
    latent_rows = VAES[name].latent[-2]
    for rank in ranks:
        assert rank.std > 1e-3
        assert rank.halo_bytes > 0
        # A rule that gathered the picture would convolve all rows on every rank.
        assert rank.share <= -(-latent_rows // world) / latent_rows + HALO_SHARE
        assert not rank.whole_again, "`remove` leaves the class's own method"


def test_ranks_with_other_memory_compute_in_as_many_parts() -> None:
    """LTX decides by a GPU's memory how many frames it computes at once."""
    ranks = values(run_ranks(2, compare_with_other_memory, "LTX Video 0.9", "get_max_chunk_size", timeout_s=120))
    assert all(rank.error <= TOLERANCE for rank in ranks)
