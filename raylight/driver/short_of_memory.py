"""Models with which workers have run out of memory: they keep no gathered weights for these any more."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from raylight.cluster.errors import OUT_OF_MEMORY, WorkerError
from raylight.host.recipe import REPLICATED, ModelRecipe

logger = logging.getLogger(__name__)

_short: set[ModelRecipe] = set()


@contextmanager
def noted(recipe: ModelRecipe) -> Iterator[None]:
    """Note it if workers run out of memory in this context, in which they use a model."""
    try:
        yield
    except WorkerError as error:
        if error.kind == OUT_OF_MEMORY and recipe.sharding != REPLICATED and may_keep(recipe):
            _short.add(recipe.without_loras)
            logger.info("workers keep no gathered weights of %s from now on, as memory is short", recipe.name)
        raise


def may_keep(recipe: ModelRecipe) -> bool:
    """Return whether workers have never run out of memory with a model."""
    return recipe.without_loras not in _short
