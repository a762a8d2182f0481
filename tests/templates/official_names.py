"""Kinds of official files by their names.

Tables of (pattern, kind): the first pattern found in a name counts. A file that no pattern matches is no failure; its
templates are skipped until it has a line here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

Value = TypeVar("Value")
Shapes = Mapping[str, tuple[int, ...]]


class UnknownFile(LookupError):
    """The name does not show the kind of a file; not a failure of what is tested."""


def by_name(table: Sequence[tuple[str, Value]], name: str, kind: str) -> Value:
    """Return the first entry whose pattern is found in a file's name. Raises UnknownFile."""
    for pattern, value in table:
        if re.search(pattern, name, re.IGNORECASE):
            return value
    raise UnknownFile(f"which {kind} {name} is, is not known here")


# Output widths of the official text encoders, which the model has to accept.
_T5, _CLIP_L, _QWEN_VL, _LLAMA, _KLEIN_4B, _KLEIN_9B, _MISTRAL = 4096, 768, 3584, 4096, 7680, 12288, 15360

_WAN = {"dim": 384, "text_dim": _T5, "freq_dim": 256}
_HEADS = {"hidden_size": 384, "num_heads": 3, "axes_dim": [16, 56, 56]}
FLUX = _HEADS | {"context_in_dim": _T5, "vec_in_dim": _CLIP_L}
_FLUX2 = _HEADS | {"axes_dim": [32, 32, 32, 32], "in_channels": 128, "out_channels": 128}
_HUNYUAN = _HEADS | {"context_in_dim": _LLAMA, "vec_in_dim": _CLIP_L}
_HUNYUAN_QWEN = _HEADS | {"context_in_dim": _QWEN_VL, "vec_in_dim": None}
_CHROMA = {
    "hidden_size": 3072,
    "num_heads": 24,
    "axes_dim": [16, 56, 56],
    "context_in_dim": _T5,
    "depth": 1,
    "depth_single_blocks": 1,
}
_Z_IMAGE = {"dim": 3840, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48], "cap_feat_dim": 2560}
_LUMINA = {"dim": 2304, "n_heads": 24, "n_kv_heads": 8, "axes_dims": [32, 32, 32], "cap_feat_dim": 2304}
_SD3 = {
    "adm_in_channels": 2048,
    "pos_embed_max_size": 64,
    "num_patches": 4096,
    "num_blocks": None,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": _T5, "out_features": 320}},
}
_LTXV = {
    "in_channels": 128,
    "attention_head_dim": 16,
    "num_attention_heads": 32,
    "cross_attention_dim": 512,
    "caption_channels": _T5,
}

# LTX-2's text encoder is narrow here as a whole (see `packs/stand_ins`).
LTX2_TEXT = 32
_LTX2 = {
    "in_channels": 128,
    "caption_channels": LTX2_TEXT,
    "connector_attention_head_dim": 16,
    "connector_num_attention_heads": LTX2_TEXT // 16,
}

# The zoo's family, and what it needs to fit the official text encoder and latent, and to be detected.
DIFFUSION_MODELS: tuple[tuple[str, tuple[str, Mapping[str, Any]]], ...] = (
    (r"ti2v_5b", ("Wan 2.2 5B", _WAN)),
    (r"fun_control_5b", ("Wan 2.2 5B", _WAN | {"in_dim": 148})),
    (r"fun_inpaint_5b", ("Wan 2.2 5B", _WAN | {"in_dim": 100})),
    (r"wan.*vace", ("Wan VACE", _WAN)),
    (r"wan2\.1.*camera", ("Wan 2.1 Camera", _WAN)),
    (r"wan2\.2.*camera", ("Wan 2.2 Camera", _WAN)),
    (r"wan2\.2.*fun_control", ("Wan T2V", _WAN | {"in_dim": 52, "in_dim_ref_conv": 16})),
    (r"wan2\.1.*fun_control", ("Wan Fun Control", _WAN)),
    (r"wan2\.2.*(i2v|inpaint)", ("Wan T2V", _WAN | {"in_dim": 36})),
    (r"flf2v", ("Wan I2V", _WAN | {"flf_pos_embed_token_number": 514})),
    (r"wan.*s2v", ("Wan 2.2 S2V", _WAN)),
    (r"humo", ("Wan HuMo", _WAN)),
    (r"animate", ("Wan Animate", _WAN)),
    (r"scail_2", ("Wan SCAIL 2", _WAN)),
    (r"dancer", ("WanDancer", _WAN)),
    (r"wan.*(i2v|inp|ati|move)|chrono_edit", ("Wan I2V", _WAN)),
    (r"wan.*t2v|causal_forcing|bernini", ("Wan T2V", _WAN)),
    (r"flux1?.*fill", ("Flux Inpaint", FLUX)),
    (r"flux1-(canny|depth)", ("Flux Dev", FLUX | {"in_channels": 32})),
    (r"flux.*schnell", ("Flux Schnell", FLUX)),
    (r"flux-2-klein.*4b", ("Flux 2 without guidance", _FLUX2 | {"context_in_dim": _KLEIN_4B})),
    (r"flux-2-klein", ("Flux 2 without guidance", _FLUX2 | {"context_in_dim": _KLEIN_9B})),
    (r"flux-?2", ("Flux 2", _FLUX2 | {"context_in_dim": _MISTRAL})),
    (r"^flux", ("Flux Dev", FLUX)),
    (r"longcat", ("LongCat Image", FLUX | {"context_in_dim": _QWEN_VL, "vec_in_dim": None})),
    (r"hunyuanvideo1\.5.*sr", ("Hunyuan Video 1.5 super-resolution", _HUNYUAN_QWEN)),
    (r"hunyuanvideo1\.5|capybara", ("Hunyuan Video 1.5", _HUNYUAN_QWEN)),
    (r"hunyuan_?image", ("Hunyuan Image 2.1", _HUNYUAN_QWEN | {"axes_dim": [64, 64]})),
    (r"hunyuan_?video.*i2v", ("Hunyuan Video I2V", _HUNYUAN)),
    (r"hunyuan_?video", ("Hunyuan Video", _HUNYUAN)),
    (r"qwen_image_layered(?!_control)", ("Qwen Image Layered", {})),
    (r"qwen_?image|firered", ("Qwen Image", {})),
    (r"radiance", ("Chroma Radiance", _CHROMA)),
    (r"chroma", ("Chroma", _CHROMA)),
    (r"z_?image", ("Z-Image", _Z_IMAGE)),
    (r"lumina|netayume", ("Lumina 2", _LUMINA)),
    (r"sd3", ("SD3", _SD3)),
    (r"ltx-2-", ("LTX-2", _LTX2)),
    (r"ltx-?video|ltxv", ("LTX-Video", _LTXV)),
    (r"minimax_h3", ("MiniMax H3", {"text_dim": 5120})),
    (r"kandinsky5lite_t2i", ("Kandinsky 5", {"model_dim": 2560})),
    (r"kandinsky5lite", ("Kandinsky 5", {"model_dim": 1792})),
    (r"hidream_(i1|e1)", ("HiDream", {})),
    (r"omnigen2", ("OmniGen 2", {})),
)

# Names of comfy.sd.TEModel.
TEXT_ENCODERS = (
    (r"umt5", "T5_XXL"),
    (r"old.*t5xxl|t5xxl.*old", "T5_XXL_OLD"),
    (r"t5_?xxl", "T5_XXL"),
    (r"clip_g", "CLIP_G"),
    (r"clip_l", "CLIP_L"),
    (r"byt5", "BYT5_SMALL_GLYPH"),
    (r"t5-?base", "T5_BASE"),
    (r"t5gemma", "T5_GEMMA"),
    (r"qwen_?2\.5_vl_fp16", "QWEN25_3B"),
    (r"qwen_?2\.5_vl", "QWEN25_7B"),
    (r"qwen_?3_?vl_?4b", "QWEN3VL_4B"),
    (r"qwen_?3_?vl_?8b", "QWEN3VL_8B"),
    (r"qwen_?3_?vl_?32b", "QWEN3VL_32B"),
    (r"qwen_3_4b|qwen_4b", "QWEN3_4B"),
    (r"qwen_3_8b", "QWEN3_8B"),
    (r"qwen_3_06b|qwen_0\.6b", "QWEN3_06B"),
    (r"qwen_1\.7b|ovis", "QWEN3_2B"),
    (r"llava_llama3|llama_3", "LLAMA3_8"),
    (r"gemma_2_2b", "GEMMA_2_2B"),
    (r"gemma_3_12b", "GEMMA_3_12B"),
    (r"gemma_3_4b", "GEMMA_3_4B"),
    (r"ministral", "MINISTRAL_3_3B"),
    (r"mistral", "MISTRAL3_24B"),
    (r"jina", "JINA_CLIP_2"),
    (r"gpt_oss", "GPT_OSS_20B"),
)
# Text encoders whose files hold their tokenizer, of sentencepiece's or of Mistral's kind.
WITH_PIECES = r"umt5|gemma|jina|t5-base"
WITH_TEKKEN = r"mistral|ministral"

# VAEs of raylight/dev/vae_zoo.py that take the latents of official ones, and classes that are narrow here.
SMALL_VAES = (
    (r"wan_?2\.?2", "TAEHV (Wan 2.2)"),
    (r"wan|qwen_image|capybara", "Wan 2.1"),
    (r"hunyuan_?video(?!_?1\.?5)|kandinsky", "TAEHV (Wan 2.1)"),
    (r"flux-?2|full_encoder_small_decoder", "Flux 2"),
    (r"^ae\b|flux|lumina|netayume|sd3", "TAESD"),
)
# What ComfyUI's detection reads of those that only its own process loads: names of weights, and the shapes of some.
VAES: tuple[tuple[str, Shapes], ...] = (
    (r"hunyuanvideo15", {"decoder.conv_in.conv.weight": (1024, 32, 3, 3, 3)}),
    (r"hunyuan_image", {"decoder.conv_in.weight": (1024, 64, 3, 3)}),
    (
        r"vae-ft-mse|sd_?xl",
        {
            "decoder.conv_in.weight": (512, 4, 3, 3),
            "encoder.down.2.downsample.conv.weight": (1,),
            "decoder.up.3.upsample.conv.weight": (1,),
            "post_quant_conv.weight": (4, 4),
        },
    ),
    (r"minimax.*video", {"decoder.transformer_blocks.0.scale1": (1,), "encoder.down.5.block.0.conv1.weight": (1,)}),
    (r"minimax.*audio", {"pre_block.attn.zero_k_bias": (1,)}),
    (
        r"ltx",
        {"decoder.up_blocks.0.res_blocks.0.conv1.conv.weight": (1024, 1), "encoder.down_blocks.1.conv.conv.bias": (1,)},
    ),
)
IMAGE_ENCODERS: tuple[tuple[str, Shapes], ...] = (
    (r"clip_vision_g", {"vision_model.encoder.layers.47.layer_norm1.weight": (1,)}),
    (r"clip_vision_h", {"vision_model.encoder.layers.30.layer_norm1.weight": (1,)}),
    (
        r"sigclip|siglip",
        {
            "vision_model.encoder.layers.22.layer_norm1.weight": (1,),
            "vision_model.encoder.layers.0.layer_norm1.weight": (1152,),
            "vision_model.embeddings.position_embedding.weight": (729, 1),
            "vision_model.embeddings.patch_embedding.weight": (1, 1, 1, 1),
        },
    ),
)
