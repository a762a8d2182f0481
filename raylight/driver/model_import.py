"""Import a MODEL of one of ComfyUI's loaders to workers: the same weights, patches and options.

The workers read the file that the loader has read, if it is known and still holds the model's weights. Otherwise they
get the weights from ComfyUI's memory.
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

from raylight.host import loading, patcher_state
from raylight.host.checkpoint import MappedModel
from raylight.host.log_messages import first_few
from raylight.host.recipe import ModelRecipe, WorkerConfig, is_gguf

from . import export, mappings, stock_weights, weightless
from .memory_file import MemoryFile
from .remote_model import RemotePatcher

logger = logging.getLogger(__name__)

# Where the path and the model options are among the arguments of ComfyUI's loaders.
_LOADERS = {comfy.sd.load_diffusion_model: (0, 1), comfy.sd.load_checkpoint_guess_config: (0, 6)}


@dataclass(slots=True)
class _Source:
    """Where workers get a model's weights, digests of these weights at that time, and the file of an export."""

    digests: dict[str, bytes]
    recipe: ModelRecipe
    file: MemoryFile | None = None


# By ComfyUI's model.
_sources: weakref.WeakKeyDictionary[BaseModel, _Source] = weakref.WeakKeyDictionary()
# By the weightless model of one on workers: an exported file exists as long as one of these needs it.
_files_in_use: weakref.WeakKeyDictionary[BaseModel, MemoryFile] = weakref.WeakKeyDictionary()


def recipe_of(model: ModelPatcher, workers: WorkerConfig) -> ModelRecipe:
    """Return how workers get the same weights; export them if no file has them. Raises ValueError for a model that
    cannot be sent to workers.
    """
    if isinstance(model, RemotePatcher):
        old = model.recipe
        if old.export is None:
            return ModelRecipe.of(old.path, old.weight_dtype, workers.sharding, old.loras, old.gguf_pack)
        _check_local(old.name, workers)
        return replace(old, sharding=workers.sharding)
    name = f"the {type(model.model).__name__} model"
    if model.get_additional_models_with_key("multigpu"):
        raise ValueError(f"{name} is already spread over GPUs by ComfyUI's own multi-GPU node: remove one of the nodes")
    with stock_weights.unpatched(model) as base:
        digests = stock_weights.digests(base)
    source = _sources.get(model.model)
    if source is None or source.digests != digests or not source.recipe.is_there:
        recipe, file = _file_of(model), None
        if recipe is None:
            _check_local(name, workers)
            _sources.pop(model.model, None)  # to make room
            recipe, file = export.export(model)
        _sources.pop(model.model, None)
        source = _sources[model.model] = _Source(digests, recipe, file)
    if source.recipe.export is not None:
        _check_local(name, workers)
    return replace(source.recipe, sharding=workers.sharding)


def _file_of(model: ModelPatcher) -> ModelRecipe | None:
    """Return the recipe of a file that has the model's weights, if one is known."""
    for recipe in _candidates(model):
        changed = _changed(model, loading.map_file(recipe, log_unused=False))
        if not changed:
            return recipe
        logger.info(
            "weights of the %s model are no longer those of %s, or it has others: %s",
            type(model.model).__name__,
            recipe.name,
            first_few(changed),
        )
    return None


def _changed(model: ModelPatcher, mapped: MappedModel) -> list[str]:
    """Return the names of weights whose content or dtype a node has changed since they were loaded."""
    changed = stock_weights.weights_differ(model, mapped.model)
    if model.is_dynamic():  # weights get their dtype when they are used
        return changed
    with stock_weights.unpatched(model) as base:
        return changed + [
            name
            for name, weight in stock_weights.weights(base).items()
            if weight.dtype != mapped.dtypes.get(name, weight.dtype) and name not in changed
        ]


def _candidates(model: ModelPatcher) -> Iterator[ModelRecipe]:
    """Yield the file that a model was loaded from, as its loader says, or as the system says for a GGUF file."""
    init: Any = getattr(model, "cached_patcher_init", None)
    if init is not None and init[0] in _LOADERS:
        path_at, options_at = _LOADERS[init[0]]
        options = init[1][options_at] if len(init[1]) > options_at else {}
        weight_dtype = loading.weight_dtype_of(options)
        if weight_dtype is not None:
            try:
                yield ModelRecipe.of(init[1][path_at], weight_dtype)
            except FileNotFoundError:  # deleted since; the model still has its weights
                pass
        return
    ggml = [
        stock_weights.plain_tensors(value)[""]
        for value in stock_weights.weights(model.model).values()
        if stock_weights.is_ggml(value)
    ]
    path = mappings.one_file_of(ggml)
    if path is not None and is_gguf(path):
        yield ModelRecipe.of(path, "default", gguf_pack=export.gguf_folder(model.model))


def _check_local(name: str, workers: WorkerConfig) -> None:
    if not workers.config.is_local:
        raise ValueError(
            f"the weights of {name} are in the memory of this ComfyUI and in no file that workers could read, and "
            f"workers of a Ray cluster may be on other machines: set ray_cluster_address to local, or {export.REMEDY}"
        )


def _keep_file(base: BaseModel, remote: RemotePatcher) -> None:
    """Keep the file of an export as long as a model on workers uses it."""
    source = _sources.get(base)
    file = _files_in_use.get(base) if source is None else source.file
    if file is not None:
        _files_in_use[remote.model] = file


def copy_state_from(model: ModelPatcher, remote: RemotePatcher) -> None:
    """Give `remote` the patches, options and wrappers of `model`, and what nodes have changed beside its diffusion
    model; what refers to `model` in them refers to `remote` on the workers.
    """
    if remote.recipe.export is not None:
        _keep_file(model.model, remote)
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
    for name, value in weightless.baseline_of(remote.model).beside.changed(model).items():
        setattr(remote.model, name, value)
    remote.made_from = model
