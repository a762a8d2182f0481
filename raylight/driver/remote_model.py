"""ComfyUI's patcher of a model whose weights are on workers: the drop-in MODEL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.model_base import BaseModel
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from raylight.host.comfy_patches import replaced_on
from raylight.host.jobs import KEY
from raylight.host.recipe import ModelRecipe, WorkerConfig

_FIRST = "raylight_patcher"


class RemotePatcher(comfy.model_patcher.ModelPatcher):
    """A MODEL for every node of ComfyUI. It has no weights, so nothing is loaded or moved here; patches, objects and
    options that nodes put on it are kept and go to the workers with each run."""

    workers: WorkerConfig
    recipe: ModelRecipe

    @classmethod
    def of(
        cls, base: BaseModel, workers: WorkerConfig, recipe: ModelRecipe, outer_sample: Callable[..., Tensor]
    ) -> RemotePatcher:
        """Return a patcher of a model of `weightless.build`, whose weights are on these workers. `outer_sample` is the
        wrapper of ComfyUI that samples it."""
        if not hasattr(base, _FIRST):
            first = cls(
                base, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device(), size=1
            )
            first.workers, first.recipe = workers, recipe
            first.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
            first.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, _prepare)
            # Kept as long as the model: ComfyUI takes a model without a patcher for a leak, and says so.
            object.__setattr__(base, _FIRST, first)
        patcher = getattr(base, _FIRST).clone()
        patcher.workers, patcher.recipe = workers, recipe
        return patcher

    def clone(self, *args: Any, **kwargs: Any) -> RemotePatcher:
        other = super().clone(*args, **kwargs)
        other.workers, other.recipe = self.workers, self.recipe
        return other

    def model_size(self) -> int:
        """One byte: weights are on the workers."""
        return 1

    def load(self, device_to: torch.device | None = None, *_: Any, **__: Any) -> None:
        """Nothing to move."""
        self.model.device = device_to
        self.model.model_lowvram = False
        self.model.model_loaded_weight_memory = 1
        self.model.current_weight_patches_uuid = self.patches_uuid

    def partially_load(self, device_to: torch.device, *_: Any, **__: Any) -> int:
        """Put objects in place, and take back those of the clone before; nothing to move."""
        self.unpatch_model(unpatch_weights=False)
        self.patch_model(load_weights=False)
        self.load(device_to)
        return 1

    def partially_unload(self, *_: Any, **__: Any) -> int:
        """Nothing to give back."""
        return 0

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        """Take objects back."""
        super().unpatch_model(None, unpatch_weights=False)
        if unpatch_weights:
            self.model.device = device_to or self.model.device
            self.model.model_loaded_weight_memory = 0
            self.model.current_weight_patches_uuid = None

    def inject_model(self) -> None:
        """Nothing here: injections are for the model that runs."""

    def eject_model(self) -> None:
        """Nothing here: injections are for the model that runs."""

    def patch_hooks(self, hooks: Any) -> None:
        """Raises ValueError where weights would change between steps: there are none here."""
        if hooks is not None and self.get_combined_hook_patches(hooks):
            raise ValueError(
                "scheduled LoRAs (hooks) change weights between steps, which workers can only where the "
                "whole run is theirs, and here it is not: see the log for what kept it in ComfyUI, and "
                "remove either"
            )

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, Any]:
        """Raises ValueError: a merge would need the weights here."""
        raise ValueError(_no_weights(self, "merge models before Parallelize Model (Ray)"))

    def state_dict_for_saving(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Raises ValueError: there is nothing to save."""
        raise ValueError(_no_weights(self, "save the model that a loader of ComfyUI gives"))

    def model_state_dict_for_saving(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Raises ValueError: there is nothing to save."""
        return self.state_dict_for_saving()


def _no_weights(patcher: RemotePatcher, remedy: str) -> str:
    return f"the weights of {patcher.recipe.name} are on Raylight's workers and not in ComfyUI: {remedy}"


def _prepare(executor: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """ComfyUI's preparation of a run, for which it frees the memory that the model is to need: here, none."""
    if not isinstance(model, RemotePatcher):
        return executor(model, *args, **kwargs)
    with replaced_on(model.model, "memory_required", lambda *_, **__: 0):
        return executor(model, *args, **kwargs)
