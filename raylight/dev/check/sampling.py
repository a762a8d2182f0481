"""A sampling run of one step with a tiny model: wrappers, patches of objects and callbacks, in ComfyUI's order."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP

from raylight.dev.zoo import families
from raylight.host.patcher_state import OPTIONS, OVERRIDE, run_with_wrappers

from .objects import CPU
from .seam import Seam

KEY = "raylight_check"
RUN = "raylight/driver/outer_sample.py"
ARGUMENTS = ("noise", "latent_image", "sampler", "sigmas", "denoise_mask", "callback", "disable_pbar", "seed")
PATH = "diffusion_model.double_blocks.0"


class Patched(torch.nn.Module):
    """In the place of a block: notes that it was called."""

    def __init__(self, block: torch.nn.Module, seen: dict[str, Any]) -> None:
        super().__init__()
        self.block, self.seen = block, seen

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen["object patch"] = True
        return self.block(*args, **kwargs)


@functools.cache
def observed() -> dict[str, Any]:
    """Sample once, and return what was seen, by name."""
    base = families()["Flux Dev"].build()
    patcher = ModelPatcher(base, CPU, CPU)
    seen: dict[str, Any] = {}

    def outer(executor: Any, *args: Any, **kwargs: Any) -> Any:
        seen["arguments"] = tuple(inspect.signature(executor.original).bind(*args, **kwargs).arguments)
        seen["guider"] = executor.class_obj
        return executor(*args, **kwargs)

    def prepare(executor: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        seen["prepared"] = model
        return executor(model, *args, **kwargs)

    def inner(executor: Any, *args: Any, **kwargs: Any) -> Any:
        seen["diffusion model"] = len(args)
        return executor(*args, **kwargs)

    def override(func: Any, *args: Any, **kwargs: Any) -> Any:
        seen["override"] = True
        return func(*args, **kwargs)

    def forward_called(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen["options"] = isinstance(kwargs.get(OPTIONS), dict)

    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, outer)
    patcher.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, prepare)
    patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, inner)
    patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, lambda model: seen.update({"before": model}))
    patcher.model_options[OPTIONS][OVERRIDE] = override
    block = base.get_submodule(PATH)
    patcher.add_object_patch(PATH, Patched(block, seen))
    hook = base.diffusion_model.register_forward_pre_hook(forward_called, with_kwargs=True)
    try:
        _sample(patcher, lambda *step: seen.update({"step": step}))
    finally:
        hook.remove()
    patcher.unpatch_model(unpatch_weights=False)
    seen["undone"] = base.get_submodule(PATH) is block
    return seen


def _sample(patcher: ModelPatcher, callback: Callable[..., None]) -> torch.Tensor:
    family = families()["Flux Dev"]
    width = family.unet_config["context_in_dim"]
    text = torch.zeros(1, 3, width)
    conds = [[text, {"pooled_output": torch.zeros(1, family.unet_config["vec_in_dim"]), "guidance": 3.0}]]
    latent = torch.zeros(1, patcher.model.latent_format.latent_channels, 4, 4)
    noise = comfy.sample.prepare_noise(latent, 1, None)
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds(conds, conds)
    guider.set_cfg(1.0)
    sampler = comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        return guider.sample(noise, latent, sampler, torch.tensor([1.0, 0.0]), callback=callback, disable_pbar=True)


def _arguments() -> str | None:
    found = observed().get("arguments", ())
    if set(found) - {"latent_shapes"} != set(ARGUMENTS):
        return f"has the arguments {', '.join(found)}, and not {', '.join(ARGUMENTS)}"
    return None


def _seen(name: str, wrong: str, test: Callable[[Any], Any] = lambda value: value is not None) -> str | None:
    return None if test(observed().get(name)) else wrong


def _wrappers_in_forward() -> str | None:
    calls: list[str] = []

    def note(executor: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append("wrapper")
        return executor(*args, **kwargs)

    model = families()["Flux Dev"].outline().diffusion_model
    x = torch.zeros(1, 16, 4, 4)
    options = {"wrappers": {WrappersMP.DIFFUSION_MODEL: {KEY: [note]}}}
    run_with_wrappers(model, lambda *_, **__: x, (x, x, x), {OPTIONS: options})
    return None if calls else "is not found in the code of a model's forward"


def seams() -> list[Seam]:
    """Return the seams of a sampling run."""
    state, not_called = "raylight/host/patcher_state.py", "is not called in a sampling run"
    return [
        Seam("CFGGuider.outer_sample", RUN, "the workers cannot do a whole run of a sampler", _arguments),
        Seam(
            "the wrapper OUTER_SAMPLE",
            RUN,
            "runs are done in ComfyUI's process, which has no weights",
            lambda: _seen("guider", not_called, lambda guider: isinstance(guider, comfy.samplers.CFGGuider)),
        ),
        Seam(
            "the wrapper PREPARE_SAMPLING",
            "raylight/driver/remote_model.py",
            "ComfyUI frees memory for a model that is not in its process",
            lambda: _seen("prepared", not_called, lambda model: isinstance(model, ModelPatcher)),
        ),
        Seam(
            "the wrapper DIFFUSION_MODEL",
            state,
            "nodes such as EasyCache have no effect, or a run fails",
            lambda: _seen("diffusion model", not_called, lambda count: count and count >= 2),
        ),
        Seam("the name DIFFUSION_MODEL", state, "such wrappers have no effect on workers", _wrappers_in_forward),
        Seam(
            "the callback ON_PRE_RUN",
            "raylight/worker/sampling.py",
            "a slow first step is taken for a worker that hangs",
            lambda: _seen("before", not_called),
        ),
        Seam(
            "the argument transformer_options of a model's forward",
            "raylight/worker/transformer_options.py",
            "tokens of no model can be split",
            lambda: _seen("options", "is not passed by its name", bool),
        ),
        Seam(
            "model_options['transformer_options']['optimized_attention_override']",
            "raylight/worker/transformer_options.py",
            "each worker attends to its own tokens only, or models are refused",
            lambda: _seen("override", "does not reach attention", bool),
        ),
        Seam(
            f"an object patch of {PATH}",
            state,
            "nodes that replace parts of a model have no effect on workers",
            lambda: _seen("object patch", "is not in the model when it runs", bool),
        ),
        Seam(
            "ModelPatcher.unpatch_model(unpatch_weights=False)",
            "raylight/driver/remote_model.py",
            "patches of one run remain for the next",
            lambda: _seen("undone", "does not undo object patches", bool),
        ),
        Seam(
            "the callback of a sampler",
            "raylight/driver/pending_run.py",
            "there are no previews, and no progress is shown",
            lambda: _seen("step", "is not called with step, x0, x and total", lambda step: step and len(step) == 4),
        ),
    ]
