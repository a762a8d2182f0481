"""A MODEL of one of ComfyUI's loaders as one of workers: the same weights, and the same things put on it.

The workers read the file that the loader has read, where it is known and the weights are still those of it. Otherwise
they get the weights from ComfyUI's memory.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import comfy.sd
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

from raylight.host import loading as models
from raylight.host import patcher_state
from raylight.host.checkpoint import MappedModel
from raylight.host.loading import weight_dtype_of
from raylight.host.recipe import ModelRecipe, WorkerConfig, is_gguf

from . import export, mappings, stock_weights, weightless
from .memory_file import MemoryFile
from .remote_model import RemotePatcher

logger = logging.getLogger(__name__)

# Where ComfyUI's loaders have the path and the model options among the arguments of their recipe.
_LOADERS = {comfy.sd.load_diffusion_model: (0, 1), comfy.sd.load_checkpoint_guess_config: (0, 6)}
_NAMED = 3  # weights that are named where many have changed


@dataclass(slots=True)
class _Known:
    """Where a model's weights are for workers, what these were like then, and the file of an export."""

    digests: dict[str, bytes]
    recipe: ModelRecipe
    file: MemoryFile | None = None


_known: weakref.WeakKeyDictionary[BaseModel, _Known] = weakref.WeakKeyDictionary()
# Of models on workers, by their weightless ones: a file stays for as long as one of them needs it.
_used: weakref.WeakKeyDictionary[BaseModel, MemoryFile] = weakref.WeakKeyDictionary()


def recipe_of(model: ModelPatcher, workers: WorkerConfig) -> ModelRecipe:
    """How workers get the same weights. Raises ValueError for a model that they cannot have."""
    if isinstance(model, RemotePatcher):
        return _of_remote(model.recipe, workers)
    _refuse_shared_out(model)
    now = _digests(model)
    known = _known.get(model.model)
    if known is None or known.digests != now or not known.recipe.is_there:
        known = _look(model, workers, now)
    if known.recipe.export is not None:
        _refuse_other_machines(model.model, workers)
    return replace(known.recipe, sharding=workers.sharding)


def exported_recipe(model: ModelPatcher, workers: WorkerConfig) -> ModelRecipe:
    """The same by way of ComfyUI's memory, whatever file the model is of. Raises ValueError as `recipe_of`."""
    _refuse_shared_out(model)
    now = _digests(model)
    known = _known.get(model.model)
    if known is None or known.recipe.export is None or known.digests != now:
        known = _export(model, workers, now)
    return replace(known.recipe, sharding=workers.sharding)


weights_differ = stock_weights.weights_differ


def _of_remote(old: ModelRecipe, workers: WorkerConfig) -> ModelRecipe:
    if old.export is None:
        return ModelRecipe.of(old.path, old.weight_dtype, workers.sharding, old.loras, old.gguf_pack)
    if not workers.config.is_local:
        raise ValueError(_elsewhere(old.name))
    return replace(old, sharding=workers.sharding)


def _look(model: ModelPatcher, workers: WorkerConfig, now: dict[str, bytes]) -> _Known:
    """Find the file of a model, or make one."""
    for recipe in _files(model):
        changed = _changed(model, models.map_file(recipe, log_unused=False))
        if not changed:
            return _remember(model.model, _Known(now, recipe))
        more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
        logger.info(
            "weights of the %s model are not those of %s any more, or it has others: %s%s",
            type(model.model).__name__,
            recipe.name,
            ", ".join(changed[:_NAMED]),
            more,
        )
    return _export(model, workers, now)


def _changed(model: ModelPatcher, mapped: MappedModel) -> list[str]:
    """The names of weights that a node has changed since they were loaded: what they are, or only their dtype."""
    changed = weights_differ(model, mapped.model)
    if model.is_dynamic():  # they get their dtype when they are used
        return changed
    with stock_weights.unpatched(model) as base:
        return changed + [
            name
            for name, weight in stock_weights.weights(base).items()
            if weight.dtype != mapped.dtypes.get(name, weight.dtype) and name not in changed
        ]


def _files(model: ModelPatcher) -> Iterator[ModelRecipe]:
    """The files that a model can be of, as its loader says or as the system says that they are mapped."""
    init: Any = getattr(model, "cached_patcher_init", None)
    if init is not None and init[0] in _LOADERS:
        path_at, options_at = _LOADERS[init[0]]
        options = init[1][options_at] if len(init[1]) > options_at else {}
        weight_dtype = weight_dtype_of(options)
        if weight_dtype is not None:
            try:
                yield ModelRecipe.of(init[1][path_at], weight_dtype)
            except FileNotFoundError:  # it has gone since, and the model is as good as before
                pass
        return
    ggml = [
        stock_weights.parts(value)[""]
        for value in stock_weights.weights(model.model).values()
        if stock_weights.is_ggml(value)
    ]
    path = mappings.one_file_of(ggml)
    if path is not None and is_gguf(path):
        yield ModelRecipe.of(path, "default", gguf_pack=export.gguf_folder(model.model))


def _export(model: ModelPatcher, workers: WorkerConfig, now: dict[str, bytes]) -> _Known:
    _refuse_other_machines(model.model, workers)
    _forget(model.model)  # room for the new one
    recipe, file = export.export(model)
    weakref.finalize(model.model, weightless.forget_file, recipe.path)
    return _remember(model.model, _Known(now, recipe, file))


def _remember(base: BaseModel, known: _Known) -> _Known:
    _forget(base)
    _known[base] = known
    return known


def _forget(base: BaseModel) -> None:
    old = _known.pop(base, None)
    if old is not None and old.recipe.export is not None:
        weightless.forget_file(old.recipe.path)


def _digests(model: ModelPatcher) -> dict[str, bytes]:
    with stock_weights.unpatched(model) as base:
        return stock_weights.digests(base)


def _refuse_shared_out(model: ModelPatcher) -> None:
    if model.get_additional_models_with_key("multigpu"):
        raise ValueError(
            f"the {type(model.model).__name__} model is shared out by ComfyUI's own multi-GPU node "
            f"already: remove that node, or this one"
        )


def _refuse_other_machines(base: BaseModel, workers: WorkerConfig) -> None:
    if not workers.config.is_local:
        raise ValueError(_elsewhere(f"the {type(base).__name__} model"))


def _elsewhere(name: str) -> str:
    return (
        f"the weights of {name} are in the memory of this ComfyUI and in no file that workers could read, and "
        f"workers of a Ray cluster may be on other machines: set ray_cluster_address to local, or "
        f"{export.REMEDY}"
    )


def _keep(base: BaseModel, remote: RemotePatcher) -> None:
    """Let the file of an export stay for as long as a model on workers is of it."""
    known = _known.get(base)
    file = _used.get(base) if known is None else known.file
    if file is None:
        return
    _used[remote.model] = file
    if all(one.file is not file for one in _known.values()):
        weightless.forget_file(remote.recipe.path)  # nobody else will ask for it


def copy_state_from(model: ModelPatcher, remote: RemotePatcher) -> None:
    """Put on `remote` what nodes have put on `model`; what they put there refers to `model` for it."""
    if remote.recipe.export is not None:
        _keep(model.model, remote)
    source = model.clone()
    wrappers = {kind: {**of_kind} for kind, of_kind in remote.wrappers.items()}
    if isinstance(model, RemotePatcher):
        source.wrappers = {
            kind: {key: w for key, w in of_kind.items() if key not in wrappers.get(kind, {})}
            for kind, of_kind in source.wrappers.items()
        }
    patcher_state.apply_state(remote, patcher_state.of_run(source), remote.recipe.sharding)
    remote.patches, remote.patches_uuid = source.patches, source.patches_uuid
    # Raylight's own come first, around all others.
    remote.wrappers = {
        kind: wrappers.get(kind, {}) | source.wrappers.get(kind, {}) for kind in {**wrappers, **source.wrappers}
    }
    remote.parent = model
