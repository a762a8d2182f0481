"""Sequence parallelism of one model: the group of ranks that splits its tokens, and the hooks by which it does.

The shape is that of context parallelism in diffusers: one call applies it, and its result removes it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.hooks import RemovableHandle

from . import shares
from .collectives import Simulated
from .exchange_error import ErrorMeter, exact_of, hybrid_attention, ulysses_attention
from .hooks import SequenceHooks
from .mesh import outer_axis, sequence_axis, world_axis
from .plan import SequencePlan
from .sequence_attention import Kernel, SequenceAttention, Strategy
from .tokens import TokenState


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """Rank `rank` of the `degree` ranks of `group`, the strategy by which their attention exchanges tokens, and the
    weights by which they divide these.

    With a degree of 1, each rank computes full sequences by itself.
    """

    strategy: Strategy
    group: dist.ProcessGroup | Simulated | None = None
    rank: int = 0
    degree: int = 1
    weights: shares.Weights = ()

    @classmethod
    def of(cls, group: dist.ProcessGroup, strategy: Strategy) -> SequenceGroup:
        """Return the sequence group of all ranks of `group`."""
        has_ring = getattr(strategy, "degrees", (1, 1))[1] > 1
        weights = shares.of_tokens(group, has_ring)
        return cls(strategy, group, dist.get_rank(group), dist.get_world_size(group), weights)

    @classmethod
    def single_rank(cls) -> SequenceGroup:
        """Return a group of this rank alone, which keeps full tokens."""
        return cls(lambda kernel, q, k, v, lengths, mask, scale: kernel(q, k, v, mask, scale))

    def exact(self) -> SequenceGroup:
        """Return the same ranks, with an exact exchange if theirs is not."""
        return replace(self, strategy=exact_of(self.strategy))

    @classmethod
    def simulated(cls, rank: int, degree: int, weights: shares.Weights = ()) -> SequenceGroup:
        """Return a group in which this process does the part of `rank` by itself: what others would send is zeros.

        So all processes can try one rank after another, alike, and an error is an error of all of them.
        """
        return cls(
            lambda kernel, q, k, v, lengths, mask, scale: q.new_zeros(*q.shape[:3], v.shape[3]),
            Simulated(),
            rank,
            degree,
            weights,
        )


class SequenceGroups:
    """The sequence groups of one mesh, for a model with `heads` attention heads."""

    def __init__(self, mesh: DeviceMesh, heads: int) -> None:
        """Create the process groups. Collective."""
        self._heads = heads
        self._sequence, self._world = sequence_axis(mesh).get_group(), world_axis(mesh).get_group()
        self._ulysses, self._outer = mesh.get_group("ulysses"), outer_axis(mesh).get_group()

    def sequence(self, strategy: Strategy) -> SequenceGroup:
        """Return the ranks that the mesh's degrees assign to one sequence, exchanging by `strategy`."""
        return SequenceGroup.of(self._sequence, strategy)

    def all_ranks(self, kernel: Kernel, error_of_8_bits: ErrorMeter | None = None) -> SequenceGroup | None:
        """Return all ranks as one group: Ulysses if the model has enough heads, else Ulysses within each Ulysses group
        and the ring between these. None if `kernel` has no log-sum-exp, which the ring needs.

        They exchange in 8 bits if there is a meter for the error.
        """
        if self._heads >= dist.get_world_size(self._world):
            strategy = ulysses_attention(self._world, error_of_8_bits)
        elif hasattr(kernel, "with_lse"):
            strategy = hybrid_attention(self._ulysses, self._outer, error_of_8_bits)
        else:
            return None
        return SequenceGroup.of(self._world, strategy)


class SequenceParallel:
    """A model whose tokens are split over ranks by its plan, until `remove`.

    The model must call `attention` instead of its own attention function.
    """

    def __init__(
        self, model: nn.Module, plan: SequencePlan, group: SequenceGroup, ulysses_degree: int | None = None
    ) -> None:
        """Install the plan's hooks. `ulysses_degree` ranks of the group split heads; all of them if it is None.

        Raises ValueError: when `model` does not match `plan`, has too few heads, or cannot be split.
        """
        self.tokens = TokenState(group.rank, group.degree, group.group, group.weights)
        self.attention = SequenceAttention(self.tokens, group.strategy)
        self._handles: list[SequenceHooks | RemovableHandle] = [SequenceHooks(model, plan, self.tokens, ulysses_degree)]

    def use(self, group: SequenceGroup) -> None:
        """Split the following forwards over the ranks of `group`."""
        self.tokens.use_group(group.rank, group.degree, group.group, group.weights)
        self.attention.strategy = group.strategy

    def remove(self) -> None:
        """Remove every hook, which leaves the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
