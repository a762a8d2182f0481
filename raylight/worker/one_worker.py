"""Attention of a model on the only worker: the kernel that the user has chosen, as with several workers."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn

from raylight.host import comfy_patches
from raylight.host.patcher_state import OVERRIDE
from raylight.parallel.plan import SequencePlan
from raylight.parallel.sequence_attention import Kernel, four_dims

from . import transformer_options

logger = logging.getLogger(__name__)


class OneWorker:
    """Routes the attention calls of a model with a plan to a kernel. Nothing is split, so it has no other hooks."""

    def __init__(self, model: nn.Module, plan: SequencePlan) -> None:
        try:
            self._handles = comfy_patches.route_unhooked_calls(model, plan.unhooked)
        except RuntimeError as error:  # for which several workers refuse the model
            logger.warning("one worker uses ComfyUI's own attention for a part of this model: %s", error)
            self._handles = []

    def install(self, model_options: dict[str, Any], kernel: Kernel) -> None:
        """Have `kernel` compute attention in forwards with these options of a patcher that have no override yet."""
        if model_options.get("transformer_options", {}).get(OVERRIDE) is None:
            transformer_options.install_override(model_options, _attention, kernel)

    def remove(self) -> None:
        """Remove every hook, which leaves the model as it was."""
        for handle in self._handles:
            handle.remove()


def _attention(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    return kernel(q, k, v, None if mask is None else four_dims(mask), scale)
