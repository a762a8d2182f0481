"""Gives what ComfyUI builds from a marked file random weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.clip_vision
import comfy.sd
import comfy.sd1_clip
import torch
from comfy.text_encoders import qwen3vl, qwen_vl

from . import narrow_ltx2, small_minimax

MARK = "raylight.weightless"
TEXT_ENCODER = "raylight.text_encoder"
_VOCABULARY = 2048
# What ComfyUI reads from a file into buffers, by the ends of their names; the other buffers are constants.
_BUFFERS = {
    ("running_mean", "mean-of-means", "latents_mean", "zero_k_bias", "mask_token"): 0.0,
    ("running_var", "std-of-means", "latents_std"): 1.0,
}
_DRAWN = 4_194_301  # prime, so that no two rows of a matrix begin at the same number


def install() -> None:
    """Replace, in this process, what makes text encoders, image encoders and VAEs."""
    _detect_text_encoders()
    _narrow_text_encoders()
    _narrow_vision()
    narrow_ltx2.install(fill)
    _fill_vaes()
    _fill_image_encoders()


def fill(module: torch.nn.Module, seed: int = 1) -> None:
    """Random weights, matrices scaled by fan-in, so that activations neither vanish nor grow.

    Raises ValueError: a buffer holds what its memory held (`unset_is_nan` shows it).
    """
    drawn = torch.randn(_DRAWN, generator=torch.Generator().manual_seed(seed))
    start = 0
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            # Drawing takes most of the time for a large model: it goes on with what is drawn, from its beginning again.
            count = tensor.numel()
            repeated = drawn.expand(-(-(start + count) // _DRAWN), -1).flatten()  # no copy where once is enough
            noise = repeated[start : start + count].reshape(tensor.shape).clone()
            start = (start + count) % _DRAWN
            if tensor.ndim >= 2 and tensor[0].numel() > 1 and id(tensor) not in embeddings:
                noise *= tensor[0].numel() ** -0.5
            elif id(tensor) not in embeddings:
                scale = name.endswith(("weight", "gamma", "scale"))
                noise = 1 + 0.1 * noise if scale else 0.1 * noise
            tensor.copy_(noise)
        for name, buffer in module.named_buffers():
            for endings, value in _BUFFERS.items():
                if name.endswith(endings):
                    buffer.fill_(value)
            if buffer.isnan().any():
                raise ValueError(f"{type(module).__name__}.{name} comes from the file: give its value in _BUFFERS")


@contextmanager
def unset_is_nan() -> Iterator[None]:
    """Let memory that nothing has written hold NaN: what it holds otherwise differs from run to run."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # with it, torch.empty fills memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)


def _detect_text_encoders() -> None:
    detect = comfy.sd.detect_te_model

    def detect_te_model(sd: dict[str, Any]) -> Any:
        if TEXT_ENCODER in sd:
            return comfy.sd.TEModel(int(sd[TEXT_ENCODER]))
        return detect(sd)

    comfy.sd.detect_te_model = detect_te_model


def _narrow_text_encoders() -> None:
    made = comfy.sd1_clip.SDClipModel.__init__

    def __init__(
        self: Any, *args: Any, model_class: Any = comfy.sd1_clip.comfy.clip_model.CLIPTextModel, **kwargs: Any
    ) -> None:
        def narrow_class(config: dict[str, Any], dtype: Any, device: Any, operations: Any) -> Any:
            with unset_is_nan():
                transformer = _first(model_class, _narrower(config), dtype, device, operations)
            fill(transformer)
            embedding = transformer.get_input_embeddings()
            look_up = embedding.forward
            embedding.forward = lambda tokens, *a, **k: look_up(tokens % embedding.weight.shape[0], *a, **k)
            return transformer

        made(self, *args, model_class=narrow_class, **kwargs)

    comfy.sd1_clip.SDClipModel.__init__ = __init__


def _narrower(config: dict[str, Any]) -> list[dict[str, Any]]:
    """A text encoder's configuration made narrow, in the words of its kind; what fits first is taken."""
    config = dict(config)
    if "d_kv" in config:  # T5
        return [config | {"d_kv": 16, "num_heads": 4, "d_ff": 64, "vocab_size": _VOCABULARY}]
    if "num_attention_heads" in config and "intermediate_size" in config:  # CLIP, whose heads fill the hidden width
        return [config | {"intermediate_size": 64, "vocab_size": _VOCABULARY}]
    narrow = {"intermediate_size": 64, "vocab_size": _VOCABULARY, "num_attention_heads": 2, "num_key_value_heads": 1}
    return [config | narrow, config]


def _narrow_vision() -> None:
    """Let the image towers of text encoders have few layers."""
    for kind in qwen3vl.QWEN3VL_VISION.values():
        kind.update(depth=3, intermediate_size=64, deepstack_visual_indexes=[0, 1, 2])
    tower = qwen_vl.Qwen2VLVisionTransformer
    made = tower.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs | {"num_layers": 2, "intermediate_size": 64})

    tower.__init__ = __init__


def _first(make: Callable[..., Any], configs: list[dict[str, Any]], *args: Any) -> Any:
    for config in configs[:-1]:
        try:
            return make(config, *args)
        except TypeError:  # an option that this kind does not have
            continue
    return make(configs[-1], *args)


def _fill_vaes() -> None:
    made = comfy.sd.VAE.__init__

    def __init__(self: Any, sd: Any = None, *args: Any, **kwargs: Any) -> None:
        if sd is None or MARK not in sd:
            made(self, sd, *args, **kwargs)
            return
        with _nothing_loaded(), small_minimax.classes(), unset_is_nan():
            made(self, sd, *args, **kwargs)
        if self.first_stage_model is not None:
            fill(self.first_stage_model)

    comfy.sd.VAE.__init__ = __init__


@contextmanager
def _nothing_loaded() -> Iterator[None]:
    load = torch.nn.Module.load_state_dict
    torch.nn.Module.load_state_dict = lambda self, *args, **kwargs: ([], [])
    try:
        yield
    finally:
        torch.nn.Module.load_state_dict = load


def _fill_image_encoders() -> None:
    made = comfy.clip_vision.ClipVisionModel.__init__
    load = comfy.clip_vision.ClipVisionModel.load_sd

    def __init__(self: Any, json_config: Any) -> None:
        if not isinstance(json_config, dict):
            with open(json_config) as file:
                json_config = json.load(file)
        with unset_is_nan():
            made(self, json_config | {"intermediate_size": 64})
        fill(self.model)

    comfy.clip_vision.ClipVisionModel.__init__ = __init__
    comfy.clip_vision.ClipVisionModel.load_sd = lambda self, sd: ([], []) if MARK in sd else load(self, sd)
