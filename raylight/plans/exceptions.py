"""The models of ComfyUI that cannot be split by sequence, by their names in `comfy.supported_models`, and why."""

from __future__ import annotations

U_NET = "a U-Net: convolutions mix neighbouring pixels between all attention blocks"
_NOT_DIFFUSION = "not a diffusion model: it runs once"

EXCEPTIONS: dict[str, str] = {
    **dict.fromkeys(
        (
            "SD15",
            "SD20",
            "SD21UnclipL",
            "SD21UnclipH",
            "SDXL",
            "SDXLRefiner",
            "SSD1B",
            "Segmind_Vega",
            "KOALA_700M",
            "KOALA_1B",
            "SVD_img2vid",
            "SV3D_u",
            "SV3D_p",
            "Stable_Zero123",
            "SD_X4Upscaler",
            "LotusD",
            "SD15_instructpix2pix",
            "SDXL_instructpix2pix",
            "Stable_Cascade_C",
            "Stable_Cascade_B",
        ),
        U_NET,
    ),
    **dict.fromkeys(("RT_DETR_v4", "SAM3", "SAM31", "DepthAnything3"), _NOT_DIFFUSION),
    "ACEStep": "its self-attention is linear (sums over all tokens, without ComfyUI's attention) and its feed-forward "
    "convolves neighbouring tokens",
    "HiDreamO1": "it attends causally within its prompt and keeps the prompt's keys and values from step to step",
    "SeedVR2": "it attends within windows of a video, not over a sequence",
    "StableAudio": "it takes a mean over all tokens within its attention",
    "Trellis2": "it has four models in one, and their tokens are a sparse list of voxels; dp_degree still makes "
    "several objects at once",
    "WAN21_CausalAR_T2V": "it generates blocks of frames one after another and keeps the keys and values of each",
    "WAN_Animate2": "each of its frames attends to all frames and to one frame of the pose video, in a buffer for the "
    "whole sequence; dp_degree still makes several videos at once",
}

WHOLE_BATCH = frozenset(("Trellis2", "WAN_Animate2"))
"""Of these, what computes rows of a batch by what it is told of the whole batch, or by its first row."""
