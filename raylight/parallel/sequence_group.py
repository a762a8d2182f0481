"""Who splits the tokens of a forward: the ranks of a sequence, or all ranks when there is no batch to share out."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .mesh import outer_axis, sequence_axis, world_axis
from .ring import HybridAttention
from .sequence_attention import Kernel, SequenceAttention, Strategy
from .tokens import TokenState
from .ulysses import UlyssesAttention


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """Ranks that split a sequence, and how their attention exchanges tokens."""

    group: dist.ProcessGroup | None
    strategy: Strategy

    def activate(self, tokens: TokenState, attention: SequenceAttention) -> None:
        """From now on these ranks do the forwards; without a group, each rank by itself."""
        if self.group is None:
            tokens.use_group(0, 1, None)
        else:
            tokens.use_group(dist.get_rank(self.group), dist.get_world_size(self.group), self.group)
        attention.strategy = self.strategy


class SequenceGroups:
    """The crews of one mesh for a model with `heads` attention heads."""

    def __init__(self, mesh: DeviceMesh, heads: int) -> None:
        """Collective, as groups are made."""
        self._heads = heads
        self._sequence = sequence_axis(mesh).get_group()
        self._world = world_axis(mesh).get_group()
        self._ulysses, self._outer = mesh.get_group("ulysses"), outer_axis(mesh).get_group()

    def sequence(self, strategy: Strategy) -> SequenceGroup:
        """The ranks that the degrees give to one sequence, and what they exchange."""
        return SequenceGroup(self._sequence, strategy)

    @staticmethod
    def single_rank() -> SequenceGroup:
        """Each rank does all of a sequence, with whole tokens."""
        return SequenceGroup(None, lambda kernel, q, k, v, _, mask, scale: kernel(q, k, v, mask, scale))

    def all_ranks(self, kernel: Kernel) -> SequenceGroup | None:
        """All ranks on one sequence: by Ulysses where there are heads enough, else with the ring between the rows of
        the mesh. None where neither the heads nor the kernel allow it."""
        if self._heads >= dist.get_world_size(self._world):
            return SequenceGroup(self._world, UlyssesAttention(self._world))
        if hasattr(kernel, "with_lse"):
            return SequenceGroup(self._world, HybridAttention(self._ulysses, self._outer))
        return None
