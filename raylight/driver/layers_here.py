"""Say so when a node computes with the layers of a model on workers by itself, in ComfyUI's process.

The result is right, as the layers have the weights of the file. But the workers take no part, and a GPU of ComfyUI's
has to hold what the node sends there.
"""

from __future__ import annotations

import logging
from typing import Any

from comfy_execution.utils import get_executing_context
from torch import nn

from raylight.sharding.fsdp import units

from . import progress

logger = logging.getLogger(__name__)


def watch(diffusion_model: nn.Module) -> None:
    """Say so for each node that calls blocks of this model, whose own forward is done by workers."""
    notice = _Notice(type(diffusion_model).__name__)
    for block in units(diffusion_model).values():
        block.register_forward_pre_hook(notice)


class _Notice:
    """A hook before a block's forward."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._told: set[str] = set()  # ids of nodes

    def __call__(self, *_: Any) -> None:
        context = get_executing_context()
        node = "" if context is None else context.node_id
        if node in self._told:
            return
        self._told.add(node)
        text = (
            f"this node computes with the layers of {self._model} in ComfyUI's process, and Raylight's workers take no "
            f"part: use a sampler of ComfyUI's, such as KSampler, to have them do it"
        )
        progress.show_text(text)
        logger.warning("%s%s", f"node {node}: " if node else "", text)
