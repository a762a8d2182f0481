"""Models on workers, as ComfyUI's nodes get them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from comfy.model_patcher import ModelPatcher

from raylight.cluster import current

from . import workers as at_workers
from .forwarding import forward
from .hand_over import finish, hand_over
from .handles import RayModel, Workers
from .nodes_sampling import guided_by, ksampler
from .overview import overview
from .parallelized import recipe_of, take_over
from .recipe import ModelRecipe
from .remote_patcher import Engine, RemotePatcher
from .together import all_of

__all__ = ["at_once", "end_workers", "guided_by", "ksampler", "load", "overview", "parallelize"]

T = TypeVar("T")
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


def at_once(runs: Sequence[Callable[[], T]]) -> list[T]:
    """What each of these samplings of models on workers returns; groups of workers do them at the same time, where
    there are several groups."""
    return all_of(runs, finish)


def end_workers(with_ray: bool) -> None:
    """End the workers, and Ray too if it is ours and `with_ray`. The next model that is loaded starts them again."""
    current.close(keep_ray=not with_ray)


def _load(workers: Workers, recipe: ModelRecipe) -> RemotePatcher:
    patcher = RemotePatcher.of(workers, recipe, _ENGINE)
    at_workers.ask(at_workers.session(workers, recipe), "load", recipe, about=recipe)
    return patcher
