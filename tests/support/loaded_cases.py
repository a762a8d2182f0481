"""Model files loaded by ranks, split with FSDP2, against ComfyUI's own loader in the same process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from comfy.cli_args import args

args.cpu = True  # before ComfyUI picks a device

import comfy.sd  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

from raylight.host.mapped import load_mapped  # noqa: E402
from raylight.host.sharded import shard_over  # noqa: E402
from raylight.parallel.mesh import build_mesh, world_axis  # noqa: E402
from raylight.parallel.shape import MeshShape  # noqa: E402

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Loaded:
    """What one rank measured: the largest difference from ComfyUI in standard deviations of its output, and bytes."""

    error: float
    sharded_bytes: int
    replicated_bytes: int
    whole_bytes: int


def wan_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {"x": torch.randn(1, 16, 2, 10, 14, generator=generator), "t": torch.tensor([0.7]),
            "c_crossattn": torch.randn(1, 11, 4096, generator=generator)}


def compare_loaded(rank: int, world: int, paths: tuple[Path, ...], offload: bool) -> list[Loaded]:
    """A Wan checkpoint per path, its weights split over `world` ranks."""
    mesh = build_mesh(MeshShape(batch=world), CPU)
    return [_compare(str(path), mesh, offload) for path in paths]


def _compare(path: str, mesh, offload: bool) -> Loaded:
    # ComfyUI runs in inference mode, where some biases are added in another order; split weights are not run in it.
    with torch.no_grad():
        # Tensors of its own: products with one row are summed in another order where a weight lies at an odd address.
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        expected = comfy.sd.load_diffusion_model_state_dict(tensors).model.apply_model(**wan_inputs())
        patcher, report = shard_over(load_mapped(path, {}), world_axis(mesh), offload)
        for _ in range(2):
            actual = patcher.model.apply_model(**wan_inputs())
    error = ((actual - expected).abs().max() / expected.std()).item()
    return Loaded(error, report.sharded_bytes, report.replicated_bytes, report.whole_bytes)
