"""A small model with a method that is called beside its forward, sharded on gloo ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from raylight.sharding.fsdp import move, shard

CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.text = nn.Linear(6, 7, device=device)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(7, 7, device=device), nn.Tanh()) for _ in range(3))

    def prepare(self, text: Tensor) -> Tensor:
        return self.text(text)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(p.shape, generator=generator) for name, p in Net("meta").named_parameters()}


def replicated() -> Net:
    net = Net()
    net.load_state_dict(weights())
    return net


def run_sharded(rank: int, world: int, offload: bool) -> tuple[list[list], int]:
    """What the method and the forward give, before and after a move, and the bytes of this rank's shards."""
    net = Net("meta")
    report = shard(net, weights(), init_device_mesh("cpu", (world,)), CPU, offload, ("prepare", "not_there"))
    text = torch.ones(2, 6)
    with torch.no_grad():
        outputs = [net.prepare(text), net(net.prepare(text))]
        move(net, CPU)
        outputs.append(net(net.prepare(text)))
    return [output.tolist() for output in outputs], report.sharded_bytes
