"""The drop-in MODEL: ComfyUI's patcher of a model whose weights are on workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.model_base import BaseModel
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from raylight.host.comfy_patches import replaced, replaced_on
from raylight.host.jobs import KEY
from raylight.host.recipe import ModelRecipe, WorkerConfig

from . import memory

_FIRST = "raylight_patcher"


class RemotePatcher(comfy.model_patcher.ModelPatcher):
    """A MODEL for every node of ComfyUI. It has no weights, so nothing is loaded or moved here. It keeps the patches,
    objects and options that nodes add; they are sent to the workers with each run.
    """

    workers: WorkerConfig
    recipe: ModelRecipe
    # The MODEL that its state was copied from. Not its `parent`: ComfyUI takes that for the model that is loaded, once
    # this one goes.
    made_from: comfy.model_patcher.ModelPatcher | None = None

    @classmethod
    def of(
        cls, base: BaseModel, workers: WorkerConfig, recipe: ModelRecipe, outer_sample: Callable[..., Tensor]
    ) -> RemotePatcher:
        """Return a patcher of a model of `weightless.build`, whose weights are on these workers. `outer_sample` is the
        wrapper of ComfyUI that samples it.
        """
        if not hasattr(base, _FIRST):
            first = cls(
                base, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device(), size=1
            )
            first.workers, first.recipe = workers, recipe
            first.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
            first.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, _prepare)
            # Kept as long as the model: ComfyUI warns of a leak where a model has no patcher.
            object.__setattr__(base, _FIRST, first)
        patcher = getattr(base, _FIRST).clone()
        patcher.workers, patcher.recipe = workers, recipe
        return patcher

    def clone(self, *args: Any, **kwargs: Any) -> RemotePatcher:
        """Return a patcher of the same model. Raises ValueError: for a copy with weights of its own, to train on."""
        if kwargs.get("force_deepcopy") or any(args[2:]):  # which only later versions of ComfyUI have
            raise ValueError(_no_weights(self, "train on the MODEL that a loader of ComfyUI gives"))
        other: Any = super().clone(*args, **kwargs)
        other.workers, other.recipe = self.workers, self.recipe
        return other

    def deepclone_multigpu(self, *_: Any, **__: Any) -> RemotePatcher:
        """Raise RuntimeError, at which Select Model Device leaves the model as it is: the workers have the GPUs."""
        remedy = (
            "the workers divide a run over the GPUs, and CFG too (cfg_degree of the initializer). Remove the node that "
            "copies the model to another GPU, such as MultiGPU CFG Split"
        )
        raise RuntimeError(_no_weights(self, remedy))

    def model_size(self) -> int:
        """Return one byte: the weights are on the workers."""
        return 1

    def load(self, device_to: torch.device | None = None, *_: Any, **__: Any) -> None:
        """Move nothing; note what ComfyUI reads of a loaded model."""
        self.model.device = device_to
        self.model.model_lowvram = False
        self.model.model_loaded_weight_memory = 1
        self.model.current_weight_patches_uuid = self.patches_uuid

    def partially_load(self, device_to: torch.device, *_: Any, **__: Any) -> int:
        """Apply object patches in the place of those of the clone that was loaded before. Move nothing."""
        self.unpatch_model(unpatch_weights=False)
        self.patch_model(load_weights=False)
        self.load(device_to)
        return 1

    def partially_unload(self, *_: Any, **__: Any) -> int:
        """Free nothing."""
        return 0

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        """Undo object patches."""
        super().unpatch_model(None, unpatch_weights=False)
        if unpatch_weights:
            self.model.device = device_to or self.model.device
            self.model.model_loaded_weight_memory = 0
            self.model.current_weight_patches_uuid = None

    def inject_model(self) -> None:
        """Do nothing: injections are for the model that runs."""

    def eject_model(self) -> None:
        """Do nothing: injections are for the model that runs."""

    def patch_hooks(self, hooks: Any) -> None:
        """Raise ValueError if weights would change between steps: there are none here."""
        if hooks is not None and self.get_combined_hook_patches(hooks):
            raise ValueError(
                "scheduled LoRAs (hooks) work only when the workers run the whole sampling loop. This run keeps the "
                "loop in ComfyUI (the log says why): remove the hook, or what keeps the loop there"
            )

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, Any]:
        """Raise ValueError: a merge would need the weights here."""
        raise ValueError(_no_weights(self, "merge models before Parallelize Model (Ray)"))

    def state_dict_for_saving(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Raise ValueError: there is nothing to save."""
        raise ValueError(_no_weights(self, "save the model that a loader of ComfyUI gives"))

    def model_state_dict_for_saving(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Raise ValueError: there is nothing to save."""
        return self.state_dict_for_saving()


def _no_weights(patcher: RemotePatcher, remedy: str) -> str:
    return f"the weights of {patcher.recipe.name} are on Raylight's workers and not in ComfyUI: {remedy}"


def _prepare(executor: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Have ComfyUI free no memory before a run, unless other models are needed too: a PREPARE_SAMPLING wrapper. What
    the run takes, the workers ask for.
    """
    if not isinstance(model, RemotePatcher):
        return executor(model, *args, **kwargs)
    with (
        replaced_on(model.model, "memory_required", lambda *_, **__: 0),
        replaced(comfy.model_management, "load_models_gpu", _load_without_freeing),
    ):
        return executor(model, *args, **kwargs)


def _load_without_freeing(load: Callable[..., Any]) -> Callable[..., Any]:
    """Return ComfyUI's function that loads models, for which models without weights need no room at all. ComfyUI would
    free what one step takes at least.
    """

    def inner(models: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        if others := [model for model in models if not isinstance(model, RemotePatcher)]:
            memory.note_models_of_run(others)
            return load(models, *args, **kwargs)
        with replaced(comfy.model_management, "free_memory", lambda _: lambda *_, **__: []):
            return load(models, *args, **kwargs)

    return inner
