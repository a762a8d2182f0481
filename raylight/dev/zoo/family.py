"""A tiny family: a configuration of ComfyUI's, and calls of its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import comfy.supported_models
import torch
from comfy.model_base import BaseModel
from torch import Tensor

from raylight.driver.preflight import is_older, running

T = TypeVar("T")


def since(release: str, entries: dict[str, T]) -> dict[str, T]:
    """Return these situations or settings if ComfyUI is at least that release, else none."""
    return {} if is_older(running(), release) else entries


class Draw:
    """Normal noise from a fixed seed: `draw(1, 16, 8, 8)`."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)


@dataclass(frozen=True)
class Family:
    """An entry of `comfy.supported_models` at tiny width.

    `config` names its class there; `unet_config` is what ComfyUI's detection would find in such a file. Each of `calls`
    makes the arguments of `BaseModel.apply_model` for one situation, in sizes that do not divide: `x`, `t` (sigma,
    (B,)), and the model's conditioning (`c_crossattn`, `y`, `ref_latents`, ...). `prepare` sets what random weights do
    not; `weights` are those that the class itself reads from a file; `trim` removes layers whose number no
    configuration sets. ComfyUI before `since` does not have the model, or cannot run it.
    """

    name: str
    config: str
    unet_config: Mapping[str, Any]
    calls: Mapping[str, Callable[[Draw], dict[str, Any]]]
    prepare: Callable[[BaseModel], None] = field(default=lambda model: None)
    weights: Callable[[], dict[str, Tensor]] = field(default=dict)
    trim: Callable[[BaseModel], None] = field(default=lambda model: None)
    since: str = ""

    def build(
        self, seed: int = 0, dtype: torch.dtype = torch.float32, computes_in: torch.dtype | None = None
    ) -> BaseModel:
        """Build the model on the CPU, the same for the same seed.

        Weights have `dtype`, and are cast to `computes_in` for each use if that is given.
        """
        model = self._made(dtype, computes_in)
        self.trim(model)
        randomize(model.diffusion_model, seed)
        self.prepare(model)
        return model.eval().requires_grad_(False)

    def outline(self) -> BaseModel:
        """Build the model with uninitialized weights, which is much faster."""
        return self._made(torch.float32, None)

    def _made(self, dtype: torch.dtype, computes_in: torch.dtype | None) -> BaseModel:
        config = getattr(comfy.supported_models, self.config)(dict(self.unet_config))
        config.unet_config.update(self.unet_config)  # some classes set their own width
        config.set_inference_dtype(dtype, computes_in)
        return config.get_model(self.weights(), "")


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Set random weights, scaled by fan-in: activations neither vanish nor grow, and every token affects the result."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if b.is_floating_point())]
    parameters = {id(p) for p in model.parameters()}
    with torch.no_grad():
        for name, tensor in tensors:
            if id(tensor) not in parameters:
                continue  # buffers are tables that the model computes
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim >= 2:
                tensor.copy_(noise * max(1, tensor[0].numel()) ** -0.5)
            elif "norm" in name and name.endswith(("weight", "scale")):
                tensor.copy_(1 + 0.1 * noise)
            else:
                tensor.copy_(0.1 * noise)
