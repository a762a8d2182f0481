"""Files besides the diffusion model: small VAEs, and others just enough to be detected (see `packs/stand_ins`)."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from official_names import (
    FLUX,
    IMAGE_ENCODERS,
    SMALL_VAES,
    TEXT_ENCODERS,
    VAES,
    WITH_PIECES,
    WITH_TEKKEN,
    Shapes,
    UnknownFile,
    by_name,
)
from safetensors.torch import save_file
from torch import Tensor

from raylight.dev import full_vaes, vae_zoo
from raylight.dev.zoo import families
from raylight.dev.zoo.family import randomize

MARK = "raylight.weightless"
TEXT_ENCODER = "raylight.text_encoder"


def text_encoder(name: str) -> dict[str, Tensor]:
    """Return a text encoder's tensors, with the tokenizer where the official file has it."""
    import comfy.sd

    kind = by_name(TEXT_ENCODERS, name, "text encoder")
    tensors = {MARK: torch.ones(1), TEXT_ENCODER: torch.tensor(comfy.sd.TEModel[kind].value)}
    if re.search(WITH_PIECES, name, re.IGNORECASE):
        tensors["spiece_model"] = _pieces()
    if re.search(WITH_TEKKEN, name, re.IGNORECASE):
        tensors["tekken_model"] = _tekken()
    return tensors


def vae(name: str) -> dict[str, Tensor]:
    """Return all tensors of a small VAE for the latent of this one, where the tests have workers load it."""
    try:
        kind = by_name(SMALL_VAES, name, "VAE")
    except UnknownFile:
        return _only_shapes(by_name(VAES, name, "VAE"))
    # ComfyUI reads the width of Wan's and of Flux.2's decoder from the file, and takes others as wide as they are
    # published: their small substitutes (TAESD, TAEHV) are made of the same operations.
    narrow = {"Wan 2.1": lambda: full_vaes.wan(16), "Flux 2": lambda: full_vaes.flux2(32)}
    model = narrow.get(kind, lambda: vae_zoo.VAES[kind].build())()
    return {key: tensor.contiguous() for key, tensor in vae_zoo.with_random_weights(model).state_dict().items()}


def image_encoder(name: str) -> dict[str, Tensor]:
    return _only_shapes(by_name(IMAGE_ENCODERS, name, "image encoder"))


def style_model(name: str) -> dict[str, Tensor]:
    """Return Flux Redux, the only style model in ComfyUI besides that of Stable Diffusion 1."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "redux_up.weight": (12288, 1152),
        "redux_up.bias": (12288,),
        "redux_down.weight": (4096, 12288),
        "redux_down.bias": (4096,),
    }
    return {
        key: (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(torch.bfloat16)
        for key, shape in shapes.items()
    }


def control_net(name: str) -> dict[str, Tensor]:
    """Return a small ControlNet of Flux in the form of XLabs, whose names need no conversion."""
    import comfy.ops
    from comfy.ldm.flux.controlnet import ControlNetFlux

    if "flux" not in name:
        raise UnknownFile(f"which ControlNet {name} is, is not known here")
    config = families()["Flux Dev"].unet_config | FLUX
    options = {key: value for key, value in config.items() if key != "image_model"}
    options |= {"mlp_ratio": 4.0, "depth": 1, "depth_single_blocks": 0}
    network = ControlNetFlux(**options, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    randomize(network, seed=9)
    return {key.replace("_norm.weight", "_norm.scale"): tensor for key, tensor in network.state_dict().items()}


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, metadata)


def _only_shapes(shapes: Shapes) -> dict[str, Tensor]:
    return {MARK: torch.ones(1)} | {key: torch.zeros(shape) for key, shape in shapes.items()}


def _pieces() -> Tensor:
    """Return a sentencepiece model of a few hundred pieces. Words that it lacks become bytes."""
    import sentencepiece

    words = [
        "a quick brown fox jumps over the lazy dog",
        "the light of the evening on a street in the rain",
        "sphinx of black quartz, judge my vow",
        "0123456789 .,;:!?()[]<>\"'",
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 4),
        model_writer=model,
        vocab_size=330,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)


def _tekken() -> Tensor:
    import base64

    vocabulary = [
        {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None} for i in range(256)
    ]
    content = {
        "config": {
            "pattern": r"\S+|\s+",
            "default_vocab_size": 1256,
            "default_num_special_tokens": 1000,
            "num_vocab_tokens": 256,
            "version": "v3",
        },
        "vocab": vocabulary,
        "special_tokens": [{"rank": i, "token_str": f"<SPECIAL_{i}>", "is_control": True} for i in range(1000)],
    }
    return torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
