"""Wan 2.1 and 2.2 with more conditions than text and a first image."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_base import BaseModel

from .family import Draw, Family
from .wan import BASE, text_to_video


def per_frame_timesteps(draw: Draw) -> dict[str, Any]:
    mask = torch.ones(1, 1, 3, 10, 14)
    mask[:, :, 0] = 0.0
    return {"x": draw(1, 48, 3, 10, 14), "t": torch.tensor([0.6]), "c_crossattn": draw(1, 9, 24), "denoise_mask": mask}


def batch_of_two(channels: int, concat: int = 0) -> Any:
    def call(draw: Draw) -> dict[str, Any]:
        result = {"x": draw(2, channels, 3, 9, 13), "t": torch.tensor([0.7, 0.3]), "c_crossattn": draw(2, 7, 24)}
        return result | ({"c_concat": draw(2, concat, 3, 9, 13)} if concat else {})

    return call


def in_context_references(draw: Draw) -> dict[str, Any]:
    return batch_of_two(16)(draw) | {"context_latents": [draw(2, 16, 1, 7, 11), draw(2, 16, 2, 5, 6)]}


def frames_appended(draw: Draw) -> dict[str, Any]:
    return batch_of_two(16)(draw) | {"time_dim_concat": draw(2, 16, 2, 9, 13)}


def vace(draw: Draw) -> dict[str, Any]:
    return batch_of_two(16)(draw) | {"vace_context": draw(2, 1, 96, 3, 10, 14), "vace_strength": [0.8]}


def two_vace_contexts(draw: Draw) -> dict[str, Any]:
    return batch_of_two(16)(draw) | {"vace_context": draw(2, 2, 96, 3, 10, 14), "vace_strength": [0.8, 0.5]}


def control_with_reference(draw: Draw) -> dict[str, Any]:
    return batch_of_two(16, 32)(draw) | {"clip_fea": draw(2, 257, 1280), "reference_latent": draw(2, 16, 10, 14)}


def camera(concat: int, image: bool) -> Any:
    def call(draw: Draw) -> dict[str, Any]:
        result = batch_of_two(16, concat)(draw) | {"camera_conditions": draw(2, 24, 3, 80, 112)}
        return result | ({"clip_fea": draw(2, 257, 1280)} if image else {})

    return call


def speech(draw: Draw) -> dict[str, Any]:
    return {
        "x": draw(1, 16, 3, 10, 14),
        "t": torch.tensor([0.6]),
        "c_crossattn": draw(1, 9, 24),
        "audio_embed": draw(1, 25, 1024, 12),
    }


def speech_with_references(draw: Draw) -> dict[str, Any]:
    return speech(draw) | {
        "reference_latent": draw(1, 16, 1, 10, 14),
        "control_video": draw(1, 16, 3, 10, 14),
        "reference_motion": draw(1, 16, 19, 10, 14),
    }


def human_motion(draw: Draw) -> dict[str, Any]:
    return batch_of_two(16, 20)(draw) | {
        "audio_embed": draw(2, 3, 8, 5, 1280),
        "reference_latent": draw(2, 36, 1, 10, 14),
    }


def pose(draw: Draw) -> dict[str, Any]:
    return {
        "x": draw(2, 16, 3, 10, 14),
        "t": torch.tensor([0.6, 0.2]),
        "c_crossattn": draw(2, 9, 24),
        "c_concat": draw(2, 4, 3, 10, 14),
        "clip_fea": draw(2, 257, 1280),
        "pose_latents": draw(2, 20, 3, 5, 7),
        "reference_latent": draw(2, 20, 1, 10, 14),
    }


def pose_with_masks(draw: Draw) -> dict[str, Any]:
    return pose(draw) | {"ref_mask_latents": draw(2, 28, 4, 10, 14), "sam_latents": draw(2, 28, 3, 5, 7)}


def animate(draw: Draw) -> dict[str, Any]:
    # The motion encoder takes faces of one size only, with all of its stages of 512 x 512 pixels. One frame of them is
    # enough: frames without a face are padded.
    return batch_of_two(16, 20)(draw) | {
        "clip_fea": draw(2, 257, 1280),
        "pose_latents": draw(2, 16, 2, 10, 14),
        "face_pixel_values": draw(2, 3, 1, 64, 64).clamp(-1, 1),
    }


def fewer_motion_stages(model: BaseModel) -> None:
    """Remove three stages of the motion encoder, each like the one before: they take most of its time."""
    del model.diffusion_model.motion_encoder.enc.net_app.convs[5:8]


def dance(fps: float) -> Any:
    def call(draw: Draw) -> dict[str, Any]:
        # The model gives each latent frame eight music tokens, so its video tokens divide by eight.
        return {
            "x": draw(1, 16, 3, 9, 15),
            "t": torch.tensor([0.6]),
            "c_crossattn": draw(1, 9, 24),
            "c_concat": draw(1, 20, 3, 9, 15),
            "clip_fea": draw(1, 257, 1280),
            "clip_fea_ref": draw(1, 257, 1280),
            "audio_embed": draw(1, 12, 35),
            "fps": fps,
            "audio_inject_scale": 0.8,
        }

    return call


FAMILIES = (
    Family(
        "Wan 2.2 5B",
        "WAN22_T2V",
        BASE | {"model_type": "t2v", "in_dim": 48, "out_dim": 48},
        {"per-frame timesteps": per_frame_timesteps, "batch of two, odd size": batch_of_two(48)},
    ),
    Family(
        "Wan T2V in context",
        "WAN21_T2V",
        BASE | {"model_type": "t2v", "in_dim": 16},
        {"references": in_context_references, "frames appended": frames_appended},
    ),
    Family(
        "Wan VACE",
        "WAN21_Vace",
        BASE | {"model_type": "vace", "in_dim": 16, "vace_in_dim": 96, "vace_layers": 2, "num_layers": 4},
        {"control": vace, "two controls": two_vace_contexts},
    ),
    Family(
        "Wan Fun Control",
        "WAN21_FunControl2V",
        BASE | {"model_type": "i2v", "in_dim": 48, "in_dim_ref_conv": 16},
        {"reference": control_with_reference},
    ),
    Family(
        "Wan 2.1 Camera",
        "WAN21_Camera",
        BASE | {"model_type": "camera", "in_dim": 32},
        {"camera and image": camera(16, True)},
    ),
    Family(
        "Wan 2.2 Camera",
        "WAN22_Camera",
        BASE | {"model_type": "camera_2.2", "in_dim": 36},
        {"camera": camera(20, False)},
    ),
    Family(
        "Wan 2.2 S2V",
        "WAN22_S2V",
        BASE | {"model_type": "s2v", "in_dim": 16},
        {"text": text_to_video, "speech": speech, "references": speech_with_references},
    ),
    Family("Wan HuMo", "WAN21_HuMo", BASE | {"model_type": "humo", "in_dim": 36}, {"audio, reference": human_motion}),
    Family("Wan SCAIL", "WAN21_SCAIL", BASE | {"model_type": "scail", "in_dim": 20}, {"pose": pose}),
    Family("Wan SCAIL 2", "WAN21_SCAIL2", BASE | {"model_type": "scail2", "in_dim": 20}, {"masks": pose_with_masks}),
    Family(
        "Wan FlowRVS",
        "WAN21_FlowRVS",
        BASE | {"model_type": "flow_rvs", "in_dim": 16},
        {"batch of two, odd size": batch_of_two(16)},
    ),
    Family(
        "Wan Animate",
        "WAN22_Animate",
        BASE | {"model_type": "animate", "in_dim": 36, "num_layers": 5},
        {"pose and face": animate},
        trim=fewer_motion_stages,
    ),
    Family(
        "WanDancer",
        "WAN22_WanDancer",
        BASE | {"model_type": "wandancer", "in_dim": 36, "music_latent_dim": 256},
        {"music": dance(30.0), "music, slower": dance(16.0)},
    ),
)
