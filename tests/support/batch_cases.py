"""The ranks' work in tests of batch parallelism."""

from __future__ import annotations

import torch
import torch.distributed as dist

from raylight.parallel.batch import BatchAxis, Rows
from raylight.parallel.shares import ALIKE, Speeds, use


def doubled(rank: int, world: int, totals: list[int], speeds: Speeds = ALIKE) -> list[tuple[int, bool, bool]]:
    """Return, for each batch, the rows computed by this rank, and whether each result in a list is that of all rows.

    The ranks share rows by `speeds`.
    """
    use(speeds)
    axis, report = BatchAxis(dist.group.WORLD), []
    for total in totals:
        whole, seen = torch.arange(total * 6.0).view(total, 2, 3), []

        def double(rows: Rows, whole: torch.Tensor = whole, seen: list[int] = seen) -> list[torch.Tensor]:
            mine = rows.of(whole)
            seen.append(len(mine))
            return [mine * 2, mine[:, :1] + 1]

        first, second = axis.call(double, total)
        report.append((seen[0], torch.equal(first, whole * 2), torch.equal(second, whole[:, :1] + 1)))
    return report
