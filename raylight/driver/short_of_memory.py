"""Models with which workers ran out of memory while they held some only to be faster. For these they hold nothing
of that kind any more: no gathered weights, and no CUDA graphs but those that the user has asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from raylight.cluster.errors import OUT_OF_MEMORY, WorkerError
from raylight.host.jobs import ModelJob
from raylight.host.log_messages import gb
from raylight.host.recipe import ModelRecipe
from raylight.host.vae_jobs import VaeRecipe
from raylight.parallel.graphs import AUTO, OFF

logger = logging.getLogger(__name__)

_short: set[ModelRecipe] = set()


@contextmanager
def noted(recipe: ModelRecipe | None) -> Iterator[None]:
    """Note it if workers run out of memory in this context, in which they use a model, if any; but not that it was
    short for what they hold to be faster, if it is without that too.
    """
    try:
        yield
    except WorkerError as error:
        if error.kind != OUT_OF_MEMORY or recipe is None or isinstance(recipe, VaeRecipe):
            raise
        if not may_keep(recipe):
            _short.remove(recipe.without_loras)
        elif error.spare_bytes > 0:
            _short.add(recipe.without_loras)
            logger.info(
                "workers keep neither gathered weights nor CUDA graphs of %s from now on, as memory is short",
                recipe.name,
            )
        raise


def may_keep(recipe: ModelRecipe) -> bool:
    """Return whether workers may hold memory for a model only to be faster."""
    return recipe.without_loras not in _short


def graphs_of(recipe: ModelRecipe, wanted: str) -> str:
    """Return the mode of CUDA graphs for a model, where the user has chosen `wanted`."""
    return OFF if wanted == AUTO and not may_keep(recipe) else wanted


def may_repeat(error: WorkerError, job: ModelJob) -> bool:
    """Return whether what failed would have more memory if it were done again, and say so: `job` was the first for
    which memory was short, and some of it was taken for speed alone.
    """
    if error.kind != OUT_OF_MEMORY or error.spare_bytes == 0 or not job.may_keep:
        return False
    logger.warning(
        "a worker ran out of memory while %s of gathered weights and CUDA graphs made it faster; workers do it again "
        "without these: %s",
        gb(error.spare_bytes),
        error,
    )
    return True
