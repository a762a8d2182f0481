"""What nodes have changed on the models of this process that stand for one on workers: found when a run is handed over,
and taken along, or refused with the name of the node."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import MethodType
from typing import Any

from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

from raylight.host.foreign_code import node_name_of
from raylight.host.patcher_state import HOOKS, Change
from raylight.host.pickling import ancestry
from raylight.host.settings import comfy_root

from . import weightless
from .baseline import INNER
from .remote_model import RemotePatcher


def of_run(patcher: RemotePatcher) -> list[Change]:
    """What a worker needs of these changes to do all that the model does.

    Raises ValueError, naming the part and where it is known the node, for what cannot be taken along.
    """
    return [*_own(patcher), *_of_sources(patcher)]


def of_forward(patcher: RemotePatcher) -> list[Change]:
    """What a worker needs of them to do the diffusion model's part. Raises as `of_run`."""
    changes = [change for change in _own(patcher) if not _is_done_here(change)]
    for change in _of_sources(patcher):
        if change.owner == "":
            raise ValueError(
                f"{node_name_of(change.value)} has changed {change.name} of the model itself, which only Load "
                f"Diffusion Model as MODEL (Ray) can follow: use it in the place of Parallelize Model "
                f"(Ray), or remove the node"
            )
        changes.append(change)
    return changes


def _is_done_here(change: Change) -> bool:
    """Whether it is around the forward of the diffusion model, or outside of it, and so done in this process."""
    if change.owner == "":
        return True
    return change.owner == INNER and (change.name == "forward" or change.name in HOOKS)


def _own(patcher: RemotePatcher) -> list[Change]:
    base = patcher.model
    with _told_of(patcher):
        changes = weightless.baseline_of(base).changes(base, _patched(patcher))
    return changes


def _of_sources(patcher: RemotePatcher) -> Iterator[Change]:
    """What is changed on the models that this one was taken over from."""
    built = weightless.baseline_of(patcher.model)
    seen: list[BaseModel] = [patcher.model]
    for source in ancestry(patcher):
        if not isinstance(source.model, BaseModel) or any(source.model is one for one in seen):
            continue
        seen.append(source.model)
        if isinstance(source, RemotePatcher):
            built_of_source = weightless.baseline_of(source.model)
        else:
            built_of_source = built
        with _told_of(patcher):
            found = built_of_source.changes(source.model, _patched(source))
        # ComfyUI itself sets methods on models that it loads, for some kinds of LoRA; it does so in a worker, too.
        yield from (
            change
            for change in found
            if isinstance(change.owner, str) and not _is_comfys(change.value) and not change.owner.startswith("python:")
        )


def _patched(patcher: ModelPatcher) -> set[str]:
    return {*patcher.object_patches, *patcher.object_patches_backup}


def _is_comfys(value: Any) -> bool:
    function = value.__func__ if isinstance(value, MethodType) else value
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith(os.path.join(comfy_root(), "comfy") + os.sep)


class _told_of:
    """Within it, what cannot be taken along is said of the model's file."""

    def __init__(self, patcher: RemotePatcher) -> None:
        self._patcher = patcher

    def __enter__(self) -> None: ...

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if isinstance(error, ValueError):
            weightless.forget(self._patcher.model)
            raise ValueError(
                f"a node has changed the model {self._patcher.recipe.name} itself in a way that cannot be sent to the "
                f"workers: {error}. Remove the node and free the model and node cache, or use a node that patches the "
                f"model"
            ) from error
