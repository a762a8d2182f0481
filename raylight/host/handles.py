"""What travels along a graph's links: descriptions, never live workers.

ComfyUI caches what nodes return for as long as it likes. A description cannot go stale: whoever
uses it gets the workers that are there now.
"""

from __future__ import annotations

from dataclasses import dataclass

from raylight.cluster.config import SessionConfig
from raylight.parallel.long_context import OURS

from .recipe import WHOLE, ModelRecipe


@dataclass(frozen=True, slots=True)
class Workers:
    """The workers that a graph asks for. `attention` is the name of their kernel, `strategy` of what exchanges tokens
    around it; with `free_memory_after` they move the model out of GPU memory after each run. `sharding` is where they
    keep a model's weights: WHOLE, SHARDED or OFFLOADED of `recipe`."""

    config: SessionConfig
    attention: str
    free_memory_after: bool = False
    strategy: str = OURS
    sharding: str = WHOLE


@dataclass(frozen=True, slots=True)
class RayModel:
    """A model on workers, by what it is made of."""

    workers: Workers
    recipe: ModelRecipe
