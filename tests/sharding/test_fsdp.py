"""Sharding on gloo ranks: a method beside forward, moving, and weights that do not fit the model."""

from __future__ import annotations

import pytest
import torch
from sharded_toy import CPU, Net, replicated, run_sharded, weights

from raylight.dev.local_ranks import run_ranks, values
from raylight.sharding.fsdp import shard


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("world", [1, 3])
def test_sharded_equals_replicated(world: int, offload: bool) -> None:
    net, text = replicated(), torch.ones(2, 6)
    with torch.no_grad():
        expected = [net.prepare(text), net(net.prepare(text)), net(net.prepare(text))]
    results = values(run_ranks(world, run_sharded, offload))
    for outputs, _ in results:
        for actual, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(torch.tensor(actual), wanted)
    assert sum(held for _, held in results) == 4 * (7 * 6 + 3 * 7 * 7)


def test_rejects_a_weight_that_is_missing() -> None:
    with pytest.raises(ValueError, match=r"the tensor blocks\.1\.0\.weight is missing"):
        shard(Net("meta"), {name: w for name, w in weights().items() if name != "blocks.1.0.weight"}, None, CPU)


def test_rejects_a_weight_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"blocks\.1\.0\.weight is \(7, 8\), and the model wants \(7, 7\)"):
        shard(Net("meta"), weights() | {"blocks.1.0.weight": torch.ones(7, 8)}, None, CPU)
