"""Ranks whose machines have unlike system memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from raylight.host import machine_memory
from raylight.host.recipe import SHARDED, FileStamp, ModelRecipe
from raylight.worker.model_cache import CachedModel, ModelCache

GB = 10**9
# The reserve of the larger one is more than the other has.
MACHINES = [SimpleNamespace(available=40 * GB, total=64 * GB), SimpleNamespace(available=300 * GB, total=512 * GB)]


def left(rank: int, world: int) -> list[str]:
    """Return which of two models are still cached when there is room made for one of 5 GB a rank."""
    models = ModelCache(torch.device("cpu"), world)
    for name in ("a", "b"):
        patcher: Any = SimpleNamespace(is_clone=lambda _: False)
        parallel: Any = SimpleNamespace(has_graphs=False, drop_graphs=lambda: None)
        models.add(CachedModel(ModelRecipe(name, "default", FileStamp(1), SHARDED), patcher, parallel, {}, {}, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: MACHINES[rank])
        patch.setattr(machine_memory, "_CGROUP", "/none")
        models.make_room_on_host(5 * GB)
    return [model.recipe.path for model in models.all()]
