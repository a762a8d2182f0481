"""A MODEL of one of ComfyUI's loaders as one of workers: the same file, and the same things put on it."""

from __future__ import annotations

from typing import Any

import comfy.sd
from comfy.model_patcher import ModelPatcher

from . import dress
from .handles import Workers
from .model import weight_dtype_of
from .recipe import ModelRecipe
from .remote_patcher import RemotePatcher

# Where ComfyUI's loaders have the path and the model options among the arguments of their recipe.
_LOADERS = {comfy.sd.load_diffusion_model: (0, 1), comfy.sd.load_checkpoint_guess_config: (0, 6)}
_REMEDY = "take it from Load Diffusion Model or Load Checkpoint, or use Load Diffusion Model as MODEL (Ray)"


def recipe_of(model: ModelPatcher, workers: Workers) -> ModelRecipe:
    """How workers load the same weights. Raises ValueError where the loader has left no recipe that they can follow."""
    if isinstance(model, RemotePatcher):
        old = model.recipe
        return ModelRecipe.of(old.path, old.weight_dtype, workers.sharding, old.loras, old.gguf_pack)
    name = type(model.model).__name__
    init: Any = getattr(model, "cached_patcher_init", None)
    if init is None or init[0] not in _LOADERS:
        raise ValueError(f"the {name} model comes from a loader that does not tell which file it has read, so workers "
                         f"cannot read it: {_REMEDY}")
    if model.get_additional_models_with_key("multigpu"):
        raise ValueError(f"the {name} model is shared out by ComfyUI's own multi-GPU node already: remove that node, "
                         f"or this one")
    path_at, options_at = _LOADERS[init[0]]
    options = init[1][options_at] if len(init[1]) > options_at else {}
    weight_dtype = weight_dtype_of(options)
    if weight_dtype is None:
        raise ValueError(f"the {name} model was loaded with options that workers cannot follow ("
                         f"{', '.join(sorted(options))}): {_REMEDY}")
    return ModelRecipe.of(init[1][path_at], weight_dtype, workers.sharding)


def take_over(model: ModelPatcher, remote: RemotePatcher) -> None:
    """Put on `remote` what nodes have put on `model`; what they put there refers to `model` for it."""
    source = model.clone()
    wrappers = {kind: {**of_kind} for kind, of_kind in remote.wrappers.items()}
    if isinstance(model, RemotePatcher):
        source.wrappers = {kind: {key: w for key, w in of_kind.items() if key not in wrappers.get(kind, {})}
                           for kind, of_kind in source.wrappers.items()}
    dress.put_on(remote, dress.of_run(source), remote.recipe.sharding)
    remote.patches, remote.patches_uuid = source.patches, source.patches_uuid
    # Raylight's own come first, around all others.
    remote.wrappers = {kind: wrappers.get(kind, {}) | source.wrappers.get(kind, {})
                       for kind in {**wrappers, **source.wrappers}}
    remote.parent = model
