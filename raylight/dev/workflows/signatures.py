"""The nodes of the templates: inputs, widgets in the order of saved values, outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Slot:
    """An input for a link."""

    name: str
    type: str
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Widget:
    """A value in the node.

    `type` matters if a link sets the value. `control` adds the widget that says how the value changes after a run.
    """

    name: str
    default: Any
    type: str = ""
    control: bool = False


@dataclass(frozen=True, slots=True)
class Signature:
    slots: tuple[Slot, ...]
    widgets: tuple[Widget, ...]
    outputs: tuple[Slot, ...]


def _slots(text: str) -> tuple[Slot, ...]:
    """Parse words `name:TYPE`; `?` at the end marks an optional input."""
    found = []
    for word in text.split():
        name, _, kind = word.partition(":")
        found.append(Slot(name, (kind or name).rstrip("?"), word.endswith("?")))
    return tuple(found)


def _node(slots: str, outputs: str, *widgets: Widget) -> Signature:
    return Signature(_slots(slots), widgets, _slots(outputs))


def _seed(name: str) -> Widget:
    return Widget(name, 0, control=True)


def _size(width: int, height: int, length: int | None) -> tuple[Widget, ...]:
    frames = () if length is None else (Widget("length", length, "INT"),)
    return (Widget("width", width, "INT"), Widget("height", height, "INT"), *frames, Widget("batch_size", 1, "INT"))


_FILE = (Widget("unet_name", ""), Widget("weight_dtype", "default"))
_ALGORITHM = (
    Widget("steps", 20, "INT"),
    Widget("cfg", 1.0, "FLOAT"),
    Widget("sampler_name", "euler"),
    Widget("scheduler", "simple"),
)
_RANGE = (
    Widget("start_at_step", 0, "INT"),
    Widget("end_at_step", 10000, "INT"),
    Widget("return_with_leftover_noise", "disable"),
)
_PROMPTS = "positive:CONDITIONING negative:CONDITIONING"

SIGNATURES: dict[str, Signature] = {
    # Raylight
    "RayInitializer": _node(
        "",
        "ray_actors_init:RAY_ACTORS_INIT",
        Widget("ray_cluster_address", "local"),
        Widget("ray_cluster_namespace", "default"),
        Widget("GPU", 0),
        Widget("ulysses_degree", 0),
        Widget("ring_degree", 1),
        Widget("cfg_degree", 1),
        Widget("dp_degree", 1),
        Widget("sync_ulysses", False),
        Widget("clear_vram_after_sampling", False),
        Widget("FSDP", False),
        Widget("FSDP_CPU_OFFLOAD", False),
        Widget("XFuser_attention", "auto"),
        Widget("skip_comm_test", False),
        Widget("use_mmap", False),
    ),
    "RayUNETLoader": _node("ray_actors_init:RAY_ACTORS_INIT lora:RAY_LORA?", "ray_actors:RAY_ACTORS", *_FILE),
    "RayModelLoader": _node("ray_actors_init:RAY_ACTORS_INIT? lora:RAY_LORA?", "model:MODEL", *_FILE),
    "RayParallelizeModel": _node("model:MODEL ray_actors_init:RAY_ACTORS_INIT?", "model:MODEL"),
    "RayParallelizeVAE": _node("vae:VAE ray_actors_init:RAY_ACTORS_INIT? ray_actors:RAY_ACTORS?", "vae:VAE"),
    "RayVAELoaderAsVAE": _node(
        "ray_actors_init:RAY_ACTORS_INIT? ray_actors:RAY_ACTORS?", "vae:VAE", Widget("vae_name", "")
    ),
    "RayLoraLoader": _node(
        "prev_ray_lora:RAY_LORA?", "ray_lora:RAY_LORA", Widget("lora_name", ""), Widget("strength_model", 1.0)
    ),
    "XFuserKSamplerAdvanced": _node(
        f"ray_actors:RAY_ACTORS {_PROMPTS} latent_image:LATENT",
        "latent:LATENT ray_actors:RAY_ACTORS",
        Widget("add_noise", "enable"),
        _seed("noise_seed"),
        *_ALGORITHM,
        *_RANGE,
        Widget("denoise", 1.0),
    ),
    "DPKSamplerAdvanced": _node(
        f"ray_actors:RAY_ACTORS noise_list:NOISE {_PROMPTS} latent_image:LATENT",
        "latent:LATENT",
        Widget("add_noise", "enable"),
        *_ALGORITHM,
        *_RANGE,
        Widget("denoise", 1.0),
    ),
    "DPNoiseList": _node(" ".join(f"noise_{n}:NOISE{'?' * (n > 1)}" for n in range(1, 9)), "noise_list:NOISE"),
    "DPConditioningList": _node(
        " ".join(f"conditioning_{n}:CONDITIONING{'?' * (n > 1)}" for n in range(1, 9)), "conditioning_list:CONDITIONING"
    ),
    # ComfyUI: files
    "CheckpointLoaderSimple": _node("", "MODEL CLIP VAE", Widget("ckpt_name", "")),
    "VAELoader": _node("", "VAE", Widget("vae_name", "")),
    "CLIPVisionLoader": _node("", "CLIP_VISION", Widget("clip_name", "")),
    "LoraLoaderModelOnly": _node("model:MODEL", "MODEL", Widget("lora_name", ""), Widget("strength_model", 1.0)),
    "LTXAVTextEncoderLoader": _node(
        "", "CLIP", Widget("text_encoder", ""), Widget("ckpt_name", ""), Widget("device", "default")
    ),
    "LTXVAudioVAELoader": Signature((), (Widget("ckpt_name", ""),), (Slot("Audio VAE", "VAE"),)),
    "LatentUpscaleModelLoader": _node("", "LATENT_UPSCALE_MODEL", Widget("model_name", "")),
    "CLIPLoader": _node("", "CLIP", Widget("clip_name", ""), Widget("type", ""), Widget("device", "default")),
    "DualCLIPLoader": _node(
        "", "CLIP", Widget("clip_name1", ""), Widget("clip_name2", ""), Widget("type", ""), Widget("device", "default")
    ),
    "ControlNetLoader": _node("", "CONTROL_NET", Widget("control_net_name", "")),
    "LoadImage": _node("", "IMAGE MASK", Widget("image", "example.png"), Widget("upload", "image")),
    "LoadVideo": _node("", "VIDEO", Widget("file", ""), Widget("upload", "image")),
    "GetVideoComponents": _node("video:VIDEO", "images:IMAGE audio:AUDIO fps:FLOAT bit_depth:INT"),
    # ComfyUI: models and prompts
    "ModelSamplingSD3": _node("model:MODEL", "MODEL", Widget("shift", 3.0)),
    "ModelSamplingAuraFlow": _node("model:MODEL", "MODEL", Widget("shift", 1.73)),
    "CFGNorm": _node("model:MODEL", "patched_model:MODEL", Widget("strength", 1.0), Widget("pre_cfg", False)),
    "CLIPTextEncode": _node("clip:CLIP", "CONDITIONING", Widget("text", "")),
    "T5TokenizerOptions": _node("clip:CLIP", "CLIP", Widget("min_padding", 0), Widget("min_length", 0)),
    "CLIPVisionEncode": _node("clip_vision:CLIP_VISION image:IMAGE", "CLIP_VISION_OUTPUT", Widget("crop", "center")),
    "TextEncodeQwenImageEditPlus": _node(
        "clip:CLIP vae:VAE? image1:IMAGE? image2:IMAGE? image3:IMAGE?", "CONDITIONING", Widget("prompt", "")
    ),
    "ConditioningZeroOut": _node("conditioning:CONDITIONING", "CONDITIONING"),
    "FluxGuidance": _node("conditioning:CONDITIONING", "CONDITIONING", Widget("guidance", 3.5)),
    "ReferenceLatent": _node("conditioning:CONDITIONING latent:LATENT?", "CONDITIONING"),
    "FluxKontextMultiReferenceLatentMethod": _node(
        "conditioning:CONDITIONING", "CONDITIONING", Widget("reference_latents_method", "offset")
    ),
    "LTXVConditioning": _node(_PROMPTS, _PROMPTS, Widget("frame_rate", 25.0)),
    "ControlNetApplyAdvanced": _node(
        f"{_PROMPTS} control_net:CONTROL_NET image:IMAGE vae:VAE?",
        _PROMPTS,
        Widget("strength", 1.0),
        Widget("start_percent", 0.0),
        Widget("end_percent", 1.0),
    ),
    # ComfyUI: pictures and latents
    "Canny": _node("image:IMAGE", "IMAGE", Widget("low_threshold", 0.4), Widget("high_threshold", 0.8)),
    "FluxKontextImageScale": _node("image:IMAGE", "IMAGE"),
    "VAEEncode": _node("pixels:IMAGE vae:VAE", "LATENT"),
    "VAEDecode": _node("samples:LATENT vae:VAE", "IMAGE"),
    "VAEDecodeAudio": _node("samples:LATENT vae:VAE", "AUDIO"),
    "LTXVAudioVAEDecode": _node("samples:LATENT audio_vae:VAE", "Audio:AUDIO"),
    "EmptySD3LatentImage": _node("", "LATENT", *_size(1024, 1024, None)),
    "EmptyHunyuanLatentVideo": _node("", "LATENT", *_size(848, 480, 25)),
    "EmptyFlux2LatentImage": _node("", "LATENT", *_size(1024, 1024, None)),
    "EmptyLTXVLatentVideo": _node("", "LATENT", *_size(768, 512, 97)),
    "LTXVEmptyLatentAudio": _node(
        "audio_vae:VAE",
        "Latent:LATENT",
        Widget("frames_number", 97),
        Widget("frame_rate", 25.0),
        Widget("batch_size", 1),
    ),
    "LTXVConcatAVLatent": _node("video_latent:LATENT audio_latent:LATENT", "latent:LATENT"),
    "LTXVSeparateAVLatent": _node("av_latent:LATENT", "video_latent:LATENT audio_latent:LATENT"),
    "LTXVLatentUpsampler": _node("samples:LATENT upscale_model:LATENT_UPSCALE_MODEL vae:VAE", "LATENT"),
    "MiniMaxH3ImageToVideo": _node(
        "clip:CLIP vae:VAE first_frame:IMAGE? last_frame:IMAGE?",
        "positive:CONDITIONING LATENT",
        Widget("prompt", ""),
        *_size(1344, 768, 124)[:3],
    ),
    "WanAnimateToVideo": _node(
        f"{_PROMPTS} vae:VAE clip_vision_output:CLIP_VISION_OUTPUT? reference_image:IMAGE? face_video:IMAGE? "
        "pose_video:IMAGE? background_video:IMAGE? character_mask:MASK? continue_motion:IMAGE?",
        f"{_PROMPTS} latent:LATENT trim_latent:INT trim_image:INT video_frame_offset:INT",
        *_size(832, 480, 77),
        Widget("continue_motion_max_frames", 5),
        Widget("video_frame_offset", 0),
    ),
    "WanImageToVideo": _node(
        f"{_PROMPTS} vae:VAE clip_vision_output:CLIP_VISION_OUTPUT? start_image:IMAGE?",
        f"{_PROMPTS} latent:LATENT",
        *_size(832, 480, 81),
    ),
    "Wan22ImageToVideoLatent": _node("vae:VAE start_image:IMAGE?", "LATENT", *_size(1280, 704, 49)),
    "WanVaceToVideo": _node(
        f"{_PROMPTS} vae:VAE control_video:IMAGE? control_masks:MASK? reference_image:IMAGE?",
        f"{_PROMPTS} latent:LATENT trim_latent:INT",
        *_size(832, 480, 81),
        Widget("strength", 1.0),
    ),
    "TrimVideoLatent": _node("samples:LATENT", "LATENT", Widget("trim_amount", 0, "INT")),
    # ComfyUI: sampling
    "KSampler": _node(
        f"model:MODEL {_PROMPTS} latent_image:LATENT", "LATENT", _seed("seed"), *_ALGORITHM, Widget("denoise", 1.0)
    ),
    "KSamplerAdvanced": _node(
        f"model:MODEL {_PROMPTS} latent_image:LATENT",
        "LATENT",
        Widget("add_noise", "enable"),
        _seed("noise_seed"),
        *_ALGORITHM,
        *_RANGE,
    ),
    "RandomNoise": _node("", "NOISE", _seed("noise_seed")),
    "BasicGuider": _node("model:MODEL conditioning:CONDITIONING", "GUIDER"),
    "CFGGuider": _node(f"model:MODEL {_PROMPTS}", "GUIDER", Widget("cfg", 8.0)),
    "Flux2Scheduler": _node("", "SIGMAS", Widget("steps", 20), Widget("width", 1024), Widget("height", 1024)),
    "LTXVScheduler": _node(
        "latent:LATENT?",
        "SIGMAS",
        Widget("steps", 20),
        Widget("max_shift", 2.05),
        Widget("base_shift", 0.95),
        Widget("stretch", True),
        Widget("terminal", 0.1),
    ),
    "ManualSigmas": _node("", "SIGMAS", Widget("sigmas", "1, 0.5")),
    "KSamplerSelect": _node("", "SAMPLER", Widget("sampler_name", "euler")),
    "BasicScheduler": _node(
        "model:MODEL", "SIGMAS", Widget("scheduler", "simple"), Widget("steps", 20), Widget("denoise", 1.0)
    ),
    "SamplerCustomAdvanced": _node(
        "noise:NOISE guider:GUIDER sampler:SAMPLER sigmas:SIGMAS latent_image:LATENT",
        "output:LATENT denoised_output:LATENT",
    ),
    # ComfyUI: results
    "SaveImage": _node("images:IMAGE", "images:IMAGE", Widget("filename_prefix", "ComfyUI")),
    "CreateVideo": _node("images:IMAGE audio:AUDIO?", "VIDEO", Widget("fps", 30.0), Widget("bit_depth", 8)),
    "SaveVideo": _node(
        "video:VIDEO",
        "video:VIDEO",
        Widget("filename_prefix", "video/ComfyUI"),
        Widget("format", "auto"),
        Widget("codec", "auto"),
    ),
    # The frontend's own
    "MarkdownNote": _node("", "", Widget("text", "")),
}
