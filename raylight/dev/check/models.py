"""The models that Raylight splits: each has the modules, arguments and heads that its plan names."""

from __future__ import annotations

import functools

from raylight.dev.zoo import families
from raylight.parallel.hooks import SequenceHooks
from raylight.parallel.tokens import TokenState
from raylight.plans import plan_for

from .seam import Seam


def seams() -> list[Seam]:
    """Return a seam for each family that this ComfyUI should have."""
    return [
        Seam(f"the model {name}", "raylight/plans", "it cannot be split over workers", functools.partial(_fits, name))
        for name in families()
    ]


def _fits(name: str) -> str | None:
    model = families()[name].outline().diffusion_model
    try:
        SequenceHooks(model, plan_for(model), TokenState(0, 1, None), 1).remove()
    except ValueError as error:
        return f"is not as its plan says: {error}"
    return None
