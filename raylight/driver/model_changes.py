"""What nodes have changed on a model object in this process whose weights are on workers: sent with a run, or refused
with the name of the node.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

from raylight.host.foreign_code import is_comfys, node_name_of
from raylight.host.patcher_state import HOOKS, Change
from raylight.host.pickling import ancestry

from . import weightless
from .beside_model import INNER
from .remote_model import RemotePatcher


def of_run(patcher: RemotePatcher) -> list[Change]:
    """Return the changes that a worker needs to run the full model.

    Raises ValueError, naming the module, and the node if it is known, for a change that cannot be sent.
    """
    beside = weightless.baseline_of(patcher.model).beside.changed(patcher)
    return [*(Change("", name, value) for name, value in beside.items()), *_own(patcher), *_of_sources(patcher)]


def of_forward(patcher: RemotePatcher) -> list[Change]:
    """Return the changes that a worker needs to run the diffusion model only. Raises as `of_run`."""
    changes = [change for change in _own(patcher) if not _is_done_here(change)]
    for change in _of_sources(patcher):
        if change.owner == "":
            raise ValueError(
                f"{node_name_of(change.value)} has changed {change.name} of the model itself, which works only with "
                f"Load Diffusion Model as MODEL (Ray): use it instead of Parallelize Model (Ray), or remove the node"
            )
        changes.append(change)
    return changes


def _is_done_here(change: Change) -> bool:
    """Return whether a change is outside of the diffusion model or around its forward, and so runs in this process."""
    return change.owner == "" or (change.owner == INNER and change.name in ("forward", *HOOKS))


def _own(patcher: RemotePatcher) -> list[Change]:
    with _naming_the_file(patcher):
        return weightless.baseline_of(patcher.model).changes(patcher.model, _patched(patcher))


def _of_sources(patcher: RemotePatcher) -> Iterator[Change]:
    """Yield the changes on the models that this one was made from."""
    seen = {id(patcher.model)}
    for source in ancestry(patcher):
        if not isinstance(source.model, BaseModel) or id(source.model) in seen:
            continue
        seen.add(id(source.model))
        baseline = weightless.baseline_of((source if isinstance(source, RemotePatcher) else patcher).model)
        with _naming_the_file(patcher):
            found = baseline.changes(source.model, _patched(source))
        # ComfyUI itself sets methods on models that it loads, for some kinds of LoRA; it does so in a worker, too.
        yield from (
            change
            for change in found
            if isinstance(change.owner, str) and not is_comfys(change.value) and not change.owner.startswith("python:")
        )


def _patched(patcher: ModelPatcher) -> set[str]:
    return {*patcher.object_patches, *patcher.object_patches_backup}


@contextmanager
def _naming_the_file(patcher: RemotePatcher) -> Iterator[None]:
    """Add the model's file and a remedy to a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"a node has changed the model {patcher.recipe.name} itself in a way that cannot be sent to the workers: "
            f"{error}. Remove the node and free the model and node cache, or use a node that patches the model"
        ) from error
