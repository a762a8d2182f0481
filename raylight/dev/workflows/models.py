"""The model files of the templates: names, folders and download pages as in ComfyUI's own templates, and sizes."""

from __future__ import annotations

from dataclasses import dataclass

_HUB = "https://huggingface.co/"
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Architecture:
    """Parameter counts of ComfyUI's class: `weights` in all, `largest_block`, which FSDP gathers at once, and `outside`
    of blocks.

    `heads` is the largest possible ulysses_degree.
    """

    name: str
    weights: int
    largest_block: int
    outside: int
    heads: int


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file of a repository and its folder in ComfyUI. The frontend offers to download it."""

    name: str
    directory: str
    repository: str
    path: str

    @property
    def url(self) -> str:
        return f"{_HUB}{self.repository}/resolve/main/{self.path}"


@dataclass(frozen=True, slots=True)
class DiffusionFile(ModelFile):
    """A diffusion model; `dtype` is that of its matrices."""

    architecture: Architecture
    dtype: str

    @property
    def bytes(self) -> int:
        """Return the size of a weight."""
        return 1 if "8" in self.dtype else 2

    @property
    def whole_gib(self) -> float:
        """Return the size of all weights."""
        return self._gib(self.architecture.weights)

    @property
    def gathered_gib(self) -> float:
        """Return the most that FSDP has gathered: a block and the next one."""
        return 2 * self._gib(self.architecture.largest_block)

    @property
    def offloaded_gib(self) -> float:
        """Return what a GPU holds with offloaded weights: two blocks, and what lies outside of blocks."""
        return self.gathered_gib + self._gib(self.architecture.outside)

    def _gib(self, weights: int) -> float:
        return weights * self.bytes / GIB


WAN_14B = Architecture("Wan 14B", 14_288_491_584, 351_394_304, 232_719_424, 40)
WAN_14B_I2V = Architecture("Wan 2.2 14B I2V", 14_288_901_184, 351_394_304, 233_129_024, 40)
WAN_5B = Architecture("Wan 2.2 5B", 4_999_787_712, 163_656_704, 90_086_592, 24)
WAN_VACE = Architecture("Wan VACE 14B", 17_337_592_896, 403_833_344, 234_690_624, 40)
FLUX = Architecture("Flux.1", 11_901_408_320, 339_831_296, 64_124_992, 24)
QWEN_IMAGE = Architecture("Qwen-Image", 20_430_401_088, 339_831_296, 40_523_328, 24)
HUNYUAN_VIDEO = Architecture("Hunyuan Video", 12_821_012_544, 339_831_296, 96_380_992, 24)
WAN_ANIMATE = Architecture("Wan 2.2 Animate 14B", 17_274_816_884, 403_838_464, 282_251_636, 40)
FLUX2_KLEIN = Architecture("Flux.2 klein 9B", 9_078_581_248, 436_208_128, 354_418_688, 32)
Z_IMAGE = Architecture("Z-Image", 6_154_901_056, 180_910_336, 11_844_672, 30)
CHROMA1 = Architecture("Chroma1", 8_899_983_424, 226_548_224, 29_072_448, 24)
LTX2 = Architecture("LTX-2", 19_585_115_392, 386_074_624, 345_575_680, 32)
MINIMAX_H3 = Architecture("MiniMax H3", 20_150_223_744, 387_007_744, 29_111_168, 56)

_WAN21, _WAN22 = "Comfy-Org/Wan_2.1_ComfyUI_repackaged", "Comfy-Org/Wan_2.2_ComfyUI_Repackaged"
_QWEN, _QWEN_EDIT = "Comfy-Org/Qwen-Image_ComfyUI", "Comfy-Org/Qwen-Image-Edit_ComfyUI"
_HUNYUAN = "Comfy-Org/HunyuanVideo_repackaged"
_FLUX_TEXT = "comfyanonymous/flux_text_encoders"
_Z_IMAGE, _CHROMA = "Comfy-Org/z_image_turbo", "Comfy-Org/Chroma1-HD_repackaged"
_LTX2, _MINIMAX = "Lightricks/LTX-2", "Comfy-Org/MiniMax-H3"


def _split(directory: str, repository: str, name: str) -> ModelFile:
    return ModelFile(name, directory, repository, f"split_files/{directory}/{name}")


def _plain(directory: str, repository: str, name: str, folder: str = "") -> ModelFile:
    """Return a file of a repository without the folder `split_files`."""
    return ModelFile(name, directory, repository, folder + name)


def _diffusion(
    repository: str,
    name: str,
    architecture: Architecture,
    dtype: str,
    *,
    folder: str = "split_files/diffusion_models/",
    directory: str = "diffusion_models",
) -> DiffusionFile:
    return DiffusionFile(name, directory, repository, folder + name, architecture, dtype)


WAN21_T2V = _diffusion(_WAN21, "wan2.1_t2v_14B_fp8_scaled.safetensors", WAN_14B, "fp8")
WAN21_T2V_BF16 = _diffusion(_WAN21, "wan2.1_t2v_14B_bf16.safetensors", WAN_14B, "bf16")
VACE = _diffusion(_WAN21, "wan2.1_vace_14B_fp16.safetensors", WAN_VACE, "fp16")
WAN22_T2V = tuple(
    _diffusion(_WAN22, f"wan2.2_t2v_{noise}_noise_14B_fp8_scaled.safetensors", WAN_14B, "fp8")
    for noise in ("high", "low")
)
WAN22_I2V = tuple(
    _diffusion(_WAN22, f"wan2.2_i2v_{noise}_noise_14B_fp8_scaled.safetensors", WAN_14B_I2V, "fp8")
    for noise in ("high", "low")
)
WAN22_TI2V = _diffusion(_WAN22, "wan2.2_ti2v_5B_fp16.safetensors", WAN_5B, "fp16")
FLUX_DEV = _diffusion("Comfy-Org/flux1-dev", "flux1-dev.safetensors", FLUX, "bf16", folder="")
FLUX_KONTEXT = _diffusion(
    "Comfy-Org/flux1-kontext-dev_ComfyUI", "flux1-dev-kontext_fp8_scaled.safetensors", FLUX, "fp8"
)
QWEN = _diffusion(_QWEN, "qwen_image_fp8_e4m3fn.safetensors", QWEN_IMAGE, "fp8")
QWEN_EDIT = _diffusion(_QWEN_EDIT, "qwen_image_edit_2511_fp8mixed.safetensors", QWEN_IMAGE, "fp8")
QWEN_EDIT_2509 = _diffusion(_QWEN_EDIT, "qwen_image_edit_2509_fp8_e4m3fn.safetensors", QWEN_IMAGE, "fp8")
HUNYUAN = _diffusion(_HUNYUAN, "hunyuan_video_t2v_720p_bf16.safetensors", HUNYUAN_VIDEO, "bf16")
ANIMATE = _diffusion(_WAN22, "wan2.2_animate_14B_bf16.safetensors", WAN_ANIMATE, "bf16")
FLUX2 = _diffusion(
    "black-forest-labs/FLUX.2-klein-base-9b-fp8", "flux-2-klein-base-9b-fp8.safetensors", FLUX2_KLEIN, "fp8", folder=""
)
Z_IMAGE_TURBO = _diffusion(_Z_IMAGE, "z_image_turbo_bf16.safetensors", Z_IMAGE, "bf16")
CHROMA = _diffusion(_CHROMA, "Chroma1-HD-fp8mixed.safetensors", CHROMA1, "fp8")
LTX2_DEV = _diffusion(_LTX2, "ltx-2-19b-dev-fp8.safetensors", LTX2, "fp8", folder="", directory="checkpoints")
MINIMAX = _diffusion(
    _MINIMAX, "minimax_h3_fl2va_pruned_int8_convrot.safetensors", MINIMAX_H3, "int8", folder="diffusion_models/"
)

UMT5 = _split("text_encoders", _WAN21, "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
CLIP_L = _plain("text_encoders", _FLUX_TEXT, "clip_l.safetensors")
T5 = _plain("text_encoders", _FLUX_TEXT, "t5xxl_fp16.safetensors")
T5_FP8 = _plain("text_encoders", _FLUX_TEXT, "t5xxl_fp8_e4m3fn_scaled.safetensors")
QWEN_VL = _split("text_encoders", _QWEN, "qwen_2.5_vl_7b_fp8_scaled.safetensors")
LLAVA = _split("text_encoders", _HUNYUAN, "llava_llama3_fp8_scaled.safetensors")
QWEN3_8B = _split("text_encoders", "Comfy-Org/flux2-klein-9B", "qwen_3_8b_fp8mixed.safetensors")
QWEN3 = _split("text_encoders", _Z_IMAGE, "qwen_3_4b.safetensors")
GEMMA = _split("text_encoders", "Comfy-Org/ltx-2", "gemma_3_12B_it_fp4_mixed.safetensors")
QWEN3_VL = _plain("text_encoders", _MINIMAX, "qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors", "text_encoders/")
CLIP_VISION = _split("clip_vision", _WAN21, "clip_vision_h.safetensors")

WAN21_VAE = _split("vae", _WAN22, "wan_2.1_vae.safetensors")
WAN22_VAE = _split("vae", _WAN22, "wan2.2_vae.safetensors")
FLUX_VAE = _split("vae", "Comfy-Org/Lumina_Image_2.0_Repackaged", "ae.safetensors")
QWEN_VAE = _split("vae", _QWEN, "qwen_image_vae.safetensors")
HUNYUAN_VAE = _split("vae", _HUNYUAN, "hunyuan_video_vae_bf16.safetensors")
FLUX2_VAE = _plain("vae", "black-forest-labs/FLUX.2-small-decoder", "full_encoder_small_decoder.safetensors")
Z_IMAGE_VAE = _split("vae", _Z_IMAGE, "ae.safetensors")
MINIMAX_VIDEO_VAE = _plain("vae", _MINIMAX, "minimax_h3_video_vae_fp16.safetensors", "vae/")
MINIMAX_AUDIO_VAE = _plain("vae", _MINIMAX, "minimax_h3_audio_vae_fp32.safetensors", "vae/")
LTX2_UPSCALER = _plain("latent_upscale_models", _LTX2, "ltx-2-spatial-upscaler-x2-1.0.safetensors")

FLUX_CANNY = ModelFile(
    "instantx_flux_canny.safetensors",
    "controlnet",
    "InstantX/FLUX.1-dev-Controlnet-Canny",
    "diffusion_pytorch_model.safetensors",
)
QWEN_LIGHTNING = _plain(
    "loras",
    "lightx2v/Qwen-Image-Lightning",
    "Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors",
    "Qwen-Image-Edit-2509/",
)
QWEN_RELIGHT = _split("loras", _QWEN_EDIT, "Qwen-Image-Edit-2509-Relight.safetensors")
LTX2_DISTILLED = _plain("loras", _LTX2, "ltx-2-19b-distilled-lora-384.safetensors")
WAN_STEPS = _plain(
    "loras", "Kijai/WanVideo_comfy", "lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors", "Lightx2v/"
)
