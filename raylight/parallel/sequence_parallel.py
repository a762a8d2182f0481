"""Sequence parallelism of one model, in the manner of context parallelism in diffusers."""

from __future__ import annotations

from torch import nn
from torch.utils.hooks import RemovableHandle

from .hooks import SequenceHooks
from .plan import SequencePlan
from .sequence_attention import SequenceAttention
from .sequence_group import SequenceGroup
from .tokens import TokenState


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
        self.tokens = TokenState(group.rank, group.degree, group.group)
        self.attention = SequenceAttention(self.tokens, group.strategy)
        self._handles: list[SequenceHooks | RemovableHandle] = [SequenceHooks(model, plan, self.tokens, ulysses_degree)]

    def use(self, group: SequenceGroup) -> None:
        """Split the following forwards over the ranks of `group`."""
        self.tokens.use_group(group.rank, group.degree, group.group)
        self.attention.strategy = group.strategy

    def remove(self) -> None:
        """Remove every hook, which leaves the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
