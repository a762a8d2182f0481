"""The template of LTX-2."""

from __future__ import annotations

from . import models, notes, parts
from .elements import Output
from .template import Mode, Template
from .workflow import Workflow

_PUPPET = (
    "A close-up of a cheerful puppet with curly yarn hair and button eyes that holds a small red umbrella in the "
    'rain. It looks up and sings: "It rains, it rains, and I do not mind at all." Drops patter on the umbrella, a '
    "piano plays softly, the camera stays close."
)
_BAD = "blurry, low quality, still frame, frames, watermark, overlay, titles, has subtitles"
_FPS, _FRAMES = 24, 121
# The second stage begins where little noise is left.
_LAST_SIGMAS = "0.909375, 0.725, 0.421875, 0.0"


def _text_to_video(workflow: Workflow) -> None:
    files = (models.LTX2_DEV,)
    parts.note(
        workflow,
        "LTX-2, text to video with sound, on all GPUs",
        "All GPUs sample one video and its sound together: first at half the size, then, with twice the width and "
        "height, in three more steps. The checkpoint also holds the VAEs: Parallelize Model (Ray) and Parallelize VAE "
        "(Ray) take what ComfyUI's own loader gives. The GPUs decode the video together; its sound is decoded on one.",
        (*files, models.GEMMA, models.LTX2_UPSCALER, models.LTX2_DISTILLED),
        notes.usp(files, uses_cfg=True),
    )
    init = parts.workers(workflow)
    with workflow.group("Step 2 - Models", column=True):
        loaded = workflow.add("CheckpointLoaderSimple", files=files, ckpt_name=files[0].name)
        model = workflow.add("RayParallelizeModel", model=loaded["MODEL"], ray_actors_init=init)["model"]
        decoder = workflow.add("RayParallelizeVAE", vae=loaded["VAE"], ray_actors_init=init)["vae"]
        clip = workflow.add(
            "LTXAVTextEncoderLoader",
            files=[models.GEMMA, *files],
            text_encoder=models.GEMMA.name,
            ckpt_name=files[0].name,
        )["CLIP"]
        sound_decoder = workflow.add("LTXVAudioVAELoader", files=files, ckpt_name=files[0].name)["Audio VAE"]
        upscaler = workflow.add(
            "LatentUpscaleModelLoader", files=[models.LTX2_UPSCALER], model_name=models.LTX2_UPSCALER.name
        )["LATENT_UPSCALE_MODEL"]
    with workflow.group("Step 3 - Prompts", column=True):
        positive = parts.prompt(workflow, clip, _PUPPET)
        negative = parts.prompt(workflow, clip, _BAD, "Negative prompt")
        timed = workflow.add("LTXVConditioning", positive=positive, negative=negative, frame_rate=float(_FPS))
        prompts = timed["positive"], timed["negative"]
    with workflow.group("Step 4 - Half the size, and length", column=True):
        video = workflow.add("EmptyLTXVLatentVideo", width=640, height=352, length=_FRAMES)["LATENT"]
        sound = workflow.add("LTXVEmptyLatentAudio", audio_vae=sound_decoder, frames_number=_FRAMES, frame_rate=_FPS)
        latent = workflow.add("LTXVConcatAVLatent", video_latent=video, audio_latent=sound["Latent"])["latent"]
        sigmas = workflow.add("LTXVScheduler", latent=latent)["SIGMAS"]
    half = parts.sample_guided(workflow, model, prompts, sigmas, latent, cfg=4.0, sampler="euler_ancestral")
    sampled = _at_full_size(workflow, model, prompts, half, upscaler, decoder)
    with workflow.group("Step 8 - Video with sound", column=True):
        done = workflow.add("LTXVSeparateAVLatent", av_latent=sampled)
        image = workflow.add("VAEDecode", samples=done["video_latent"], vae=decoder)["IMAGE"]
        audio = workflow.add("LTXVAudioVAEDecode", samples=done["audio_latent"], audio_vae=sound_decoder)["Audio"]
        parts.video_file(workflow, image, "ltx-2", float(_FPS), audio)


def _at_full_size(
    workflow: Workflow, model: Output, prompts: tuple[Output, Output], half: Output, upscaler: Output, decoder: Output
) -> Output:
    """Add the second stage, with a LoRA for few steps."""
    with workflow.group("Step 6 - Twice the size", column=True):
        parted = workflow.add("LTXVSeparateAVLatent", av_latent=half)
        larger = workflow.add(
            "LTXVLatentUpsampler", samples=parted["video_latent"], upscale_model=upscaler, vae=decoder
        )["LATENT"]
        latent = workflow.add("LTXVConcatAVLatent", video_latent=larger, audio_latent=parted["audio_latent"])["latent"]
        file = models.LTX2_DISTILLED
        few_steps = workflow.add("LoraLoaderModelOnly", files=[file], model=model, lora_name=file.name)["MODEL"]
        sigmas = workflow.add("ManualSigmas", sigmas=_LAST_SIGMAS)["SIGMAS"]
    return parts.sample_guided(
        workflow, few_steps, prompts, sigmas, latent, sampler="euler_ancestral", title="Step 7 - Last steps on all GPUs"
    )


TEMPLATES = (Template("ltx-2-19b-usp", "LTX-2", "Text to video with sound", Mode.USP, _text_to_video),)
