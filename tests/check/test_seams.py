"""`make check`: this ComfyUI has every seam, and one that is taken away is named with what stops working."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import comfy.ldm.flux.layers
import comfy.ldm.modules.attention as attention
import comfy.model_management
import comfy.patcher_extension
import comfy.samplers
import comfy.sd
import pytest
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor

import nodes as comfy_nodes
from raylight.dev.check import all_seams, loading, names, nodes, objects, sampling
from raylight.dev.check.seam import Seam

CACHES = (objects.patcher, objects.vae, sampling.observed, loading.mapped, nodes.ours)


@pytest.fixture(scope="module")
def seams() -> dict[str, Seam]:
    return {seam.what: seam for seam in all_seams()}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing is remembered of a ComfyUI that lacked something."""
    yield
    for cached in CACHES:
        cached.cache_clear()


@pytest.mark.smoke
def test_this_comfyui_has_every_seam(seams: dict[str, Seam]) -> None:
    assert len(seams) > 300
    assert [sentence for seam in seams.values() if (sentence := seam.missing())] == []


def load_otherwise(unet_path: str) -> None: ...


def block_otherwise(self: Any, image: Any, text: Any) -> None: ...


def renaming(argument: str, name: str) -> Callable[..., Any]:
    """Return `outer_sample` with another name for an argument."""
    original = comfy.samplers.CFGGuider.outer_sample

    def outer_sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)

    parameters = inspect.signature(original).parameters.values()
    outer_sample.__signature__ = inspect.Signature(
        [one.replace(name=name) if one.name == argument else one for one in parameters]
    )
    return outer_sample


async def not_loaded(*_: Any, **__: Any) -> bool:
    return False


REMOVED: dict[str, tuple[Any, str, Any, str]] = {
    "comfy.sd.load_diffusion_model": (comfy.sd, "load_diffusion_model", None, r"is gone\. It is used in raylight/"),
    "comfy.model_management.xformers_enabled_vae": (
        comfy.model_management,
        "xformers_enabled_vae",
        None,
        r"is gone\. .*raylight/host/vae_file\.py:\d+: without it, this does not work: \"Build ComfyUI's VAE",
    ),
    "ModelPatcher.get_combined_hook_patches": (
        ModelPatcher,
        "get_combined_hook_patches",
        None,
        r"is gone\. .*remote_model\.py: without it, the MODEL \(Ray\) would do in ComfyUI's process what",
    ),
    "comfy.ldm.modules.attention.optimized_attention": (
        attention,
        "optimized_attention",
        lambda q, *_, **__: q,
        r"does not call the override in transformer_options\['optimized_attention_override'\]\. .* attends to its own",
    ),
    "what optimized_attention_for_device returns": (
        attention,
        "optimized_attention_for_device",
        lambda device: lambda q, *_, **__: q,
        "does not call the override",
    ),
    "the wrapper OUTER_SAMPLE": (
        comfy.patcher_extension,
        "get_all_wrappers",
        lambda *_, **__: [],
        r"is not called in a sampling run\. .*: without it, runs are done in ComfyUI's process",
    ),
    "the model Flux Dev": (
        comfy.ldm.flux.layers.DoubleStreamBlock,
        "forward",
        block_otherwise,
        "is not as its plan says: .*it cannot be split over workers",
    ),
    "loading this pack": (comfy_nodes, "load_custom_node", not_loaded, r"fails \(RuntimeError: .*no Raylight nodes"),
}


@pytest.mark.parametrize("what", REMOVED)
def test_says_what_is_gone(seams: dict[str, Seam], monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    assert seams[what].missing() is None
    for cached in CACHES:
        cached.cache_clear()
    owner, name, value, sentence = REMOVED[what]
    if value is None:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, value)
    found = seams[what].missing()
    assert found is not None and found.startswith(f"{what} ")
    assert re.search(sentence, found), found


class Preference:
    """As a checkpoint's preferred attention in ComfyUI after 0.33."""

    def function(self, q: Any, *_: Any, **__: Any) -> Any:
        return q


def preferring_first(q: Any, k: Any, v: Any, heads: int, preferred_attention: Any, **_: Any) -> Any:
    return preferred_attention.function(q, k, v, heads)


def test_says_that_a_preferred_attention_comes_before_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "ComfyAttention", Preference, raising=False)
    stock = attention.optimized_attention
    monkeypatch.setattr(attention, "optimized_attention", lambda *a, preferred_attention, **k: stock(*a, **k))
    (found,) = (seam for seam in all_seams() if "prefers an attention" in seam.what)
    assert found.missing() is None
    monkeypatch.setattr(attention, "optimized_attention", preferring_first)
    assert "does not call the override" in str(found.missing())


def test_says_which_argument_is_no_longer_taken(seams: dict[str, Seam], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy.sd, "load_diffusion_model", load_otherwise)
    found = str(seams["comfy.sd.load_diffusion_model"].missing())
    assert "takes other arguments (raylight/host/checkpoint.py:" in found and "model_options" in found


def test_says_which_argument_of_a_run_is_gone(seams: dict[str, Seam], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy.samplers.CFGGuider, "outer_sample", renaming("denoise_mask", "mask"))
    found = str(seams["CFGGuider.outer_sample"].missing())
    assert "has the arguments" in found and "sigmas, mask, callback" in found


def test_says_which_format_cannot_be_taken_apart(seams: dict[str, Seam], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(QuantizedTensor, "__tensor_flatten__")
    found = str(seams["the quantised format float8_e4m3fn"].missing())
    assert "cannot have their weights sharded (FSDP)" in found


def test_every_file_that_names_comfyui_is_read() -> None:
    uses = {use.split(":")[0] for seam in names.seams() for use in seam.where.replace(" and ", ", ").split(", ")}
    assert {"raylight/worker/lora.py", "raylight/host/vae_file.py", "raylight/driver/memory.py"} <= uses
    assert uses <= {file.relative_to(names.ROOT).as_posix() for file in names.source_files()}
