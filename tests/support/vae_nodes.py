"""A VAE in ComfyUI's own nodes, and its pictures against another's."""

from __future__ import annotations

from pathlib import Path

import comfy.sd
import comfy.utils
import torch
from torch import Tensor

import nodes as comfy_nodes
from raylight.cluster.config import SessionConfig
from raylight.dev.demo import comfy_server
from raylight.host.recipe import WorkerConfig
from raylight.parallel.mesh import MeshShape

DEMO = Path(comfy_server.__file__).parent / "model" / "raylight-demo-vae.safetensors"
WORKERS = WorkerConfig(SessionConfig(MeshShape(ulysses=2), "cpu"), "TORCH")
TOLERANCE = 1e-4


def read(path: Path) -> comfy.sd.VAE:
    tensors, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    return comfy.sd.VAE(sd=tensors, metadata=metadata)


def latent(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype and actual.device == expected.device
    assert expected.std() > 1e-2
    assert ((actual - expected).abs().max() / expected.std()).item() <= TOLERANCE


def decoded(vae: comfy.sd.VAE, samples: Tensor) -> Tensor:
    return comfy_nodes.VAEDecode().decode(vae, {"samples": samples})[0]
