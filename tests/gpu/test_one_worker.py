"""One worker with each of PyTorch's kernels: what ComfyUI gives by its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu_cases import DEPTHS, latent, on_workers
from torch import Tensor

from raylight.host.recipe import REPLICATED
from raylight.parallel.mesh import MeshShape


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("attention", ["auto", "TORCH_FLASH", "TORCH_CUDNN", "TORCH_EFFICIENT"])
def test_each_kernel(attention: str, depth: str, path: Path, expected: Tensor, compare) -> None:
    model = on_workers(path, REPLICATED, mesh=MeshShape(), attention=attention)
    compare(latent(model, DEPTHS[depth]), expected, attention)
