"""What of a job forbids CUDA graphs: code of nodes that must run in each forward, and weights that come and go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from raylight.host.jobs import Inside, ModelJob
from raylight.host.patcher_state import DIFFUSION_MODEL, OPTIONS, OVERRIDE, Change

from .transformer_options import is_ours

_COMPILED = "torch.compile"  # ComfyUI's key of the wrapper that has the model compiled


def obstacle(patcher: ModelPatcher, changes: Sequence[Change], job: ModelJob) -> str:
    """Return why no forward of this job can be captured, "" if some can."""
    if changes or job.inside != Inside() or any(name.startswith(DIFFUSION_MODEL) for name in patcher.object_patches):
        return "a node has changed code inside the model, which must run each time"
    for name, what in (
        ("injections", "injections"),
        ("weight_wrapper_patches", "functions around weights"),
        ("hook_patches", "scheduled LoRAs"),
    ):
        if getattr(patcher, name, None):
            return f"the model has {what}, which must run each time"
    return ""


def is_compiled(model_options: Mapping[str, Any]) -> bool:
    """Return whether a run with these options of a patcher has its model compiled by ComfyUI, hooks included."""
    wrappers = model_options.get(OPTIONS, {}).get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    return bool(wrappers.get(_COMPILED))


def obstacle_in(options: Mapping[str, Any]) -> str:
    """Return why a forward with these options cannot be captured, "" if it can."""
    if any(options.get("patches", {}).values()) or any(options.get("patches_replace", {}).values()):
        return "nodes have put patches into the model, which must run each time"
    if options.get(OVERRIDE) is not None and not is_ours(options[OVERRIDE]):
        return "a node has replaced the attention, and its code must run each time"
    return ""
