"""Sequence parallelism of one of ComfyUI's diffusion models: the plan's hooks, node patches, and attention calls."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from raylight.host import comfy_patches
from raylight.parallel.mesh import sequence_axis
from raylight.parallel.plan import SequencePlan
from raylight.parallel.ring import HybridAttention
from raylight.parallel.sequence_attention import Kernel, Strategy
from raylight.parallel.sequence_parallel import SequenceGroup, SequenceParallel

from . import transformer_options


class ComfySequenceParallel(SequenceParallel):
    """A diffusion model of ComfyUI whose tokens are split. It must be called with options prepared by `install`."""

    def __init__(
        self, model: nn.Module, plan: SequencePlan, group: SequenceGroup, ulysses_degree: int | None = None
    ) -> None:
        """As `SequenceParallel`.

        Raises RuntimeError: when ComfyUI's module of the model has no attention function to replace.
        """
        super().__init__(model, plan, group, ulysses_degree)
        self._handles += comfy_patches.route_unhooked_calls(model, plan.unhooked)
        self._handles.append(transformer_options.install_patches(model, plan, self.tokens))

    def install(self, model_options: dict[str, Any], kernel: Kernel) -> None:
        """Route the attention calls of forwards with these `model_options` of a patcher here; `kernel` does them."""
        transformer_options.install_override(model_options, self.attention, kernel)


def apply_sequence_parallel(
    model: nn.Module, plan: SequencePlan, mesh: DeviceMesh, strategy: Strategy | None = None
) -> ComfySequenceParallel:
    """Split the tokens of `model` by `plan` over the sequence axis of `mesh`; `remove` of the result undoes it.

    `strategy` exchanges tokens around attention: by default Ulysses within the mesh's Ulysses axis, a ring between
    these groups (USP). Collective.

    Raises ValueError: when `model` does not match `plan`, has too few heads, or cannot be split.
    """
    strategy = strategy or HybridAttention(mesh.get_group("ulysses"), mesh.get_group("ring"))
    group = SequenceGroup.of(sequence_axis(mesh).get_group(), strategy)
    return ComfySequenceParallel(model, plan, group, mesh["ulysses"].size())
