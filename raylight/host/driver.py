"""Models on workers, as ComfyUI's nodes get them."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher

from . import workers as at_workers
from .forwarding import forward
from .hand_over import hand_over
from .handles import RayModel, Workers
from .parallelized import recipe_of, take_over
from .recipe import ModelRecipe
from .remote_patcher import Engine, RemotePatcher

_ENGINE = Engine(hand_over, forward)


def load(model: RayModel) -> RemotePatcher:
    """A MODEL whose weights are loaded on the workers.

    Raises ValueError for a model that they refuse; ConnectionError, RuntimeError or WorkerError where they cannot
    start.
    """
    return _load(model.workers, model.recipe)


def parallelize(model: ModelPatcher, workers: Workers) -> RemotePatcher:
    """The same MODEL, loaded on workers: weights, patches and options.

    Raises what `load` raises, and ValueError for a model that workers cannot have.
    """
    patcher = _load(workers, recipe_of(model, workers))
    take_over(model, patcher)
    return patcher


def _load(workers: Workers, recipe: ModelRecipe) -> RemotePatcher:
    patcher = RemotePatcher.of(workers, recipe, _ENGINE)
    at_workers.ask(at_workers.session(workers, recipe), "load", recipe)
    return patcher
