"""The order in which a model becomes parallel."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from raylight.host.recipe import OFFLOADED, REPLICATED, SHARDED, FileStamp, ModelRecipe
from raylight.worker import parallelize

MAPPED = SimpleNamespace(model="model", lora_keys={}, shapes={})


@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED, OFFLOADED])
def test_hooks_come_before_weights_and_the_batch_hook_last(sharding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def noted(name: str, result: Any) -> Any:
        return lambda *_: order.append(name) or result

    parallel = SimpleNamespace(finalize_hooks=noted("batch hook", None))
    monkeypatch.setattr(parallelize.loading, "map_file", noted("file", MAPPED))
    monkeypatch.setattr(parallelize.loading, "file_errors", nullcontext)
    monkeypatch.setattr(parallelize, "world_axis", lambda _: "axis")
    monkeypatch.setattr(parallelize, "ParallelModel", noted("hooks", parallel))
    monkeypatch.setattr(parallelize, "build_replicated", noted(REPLICATED, ("patcher", 1)))
    report = SimpleNamespace(host_bytes=2)
    sharded = {offload: noted(name, ("patcher", report)) for offload, name in ((False, SHARDED), (True, OFFLOADED))}
    monkeypatch.setattr(parallelize, "build_sharded", lambda *arguments: sharded[arguments[-1]]())
    recipe = ModelRecipe("/models/a.safetensors", "default", FileStamp(1), sharding)
    model = parallelize.load_parallel(recipe, None, None)
    assert order == ["file", "hooks", sharding, "batch hook"]
    assert (model.patcher, model.parallel) == ("patcher", parallel)
    assert model.host_bytes == (1 if sharding == REPLICATED else 2)
