"""XFuser KSampler (Advanced): ComfyUI's KSampler (Advanced), run by the workers."""

from __future__ import annotations

from inspect import cleandoc
from typing import Any

import comfy.samplers
from comfy_api.latest import io

from .common import CATEGORY, RayActors, driver


class XFuserKSamplerAdvanced(io.ComfyNode):
    """Denoises a latent on the workers of a Ray model: ComfyUI's KSampler (Advanced), on several GPUs at once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="XFuserKSamplerAdvanced",
            display_name="XFuser KSampler (Advanced)",
            category=CATEGORY,
            description=cleandoc(cls.__doc__),
            search_aliases=["ray ksampler", "multi gpu sampler", "parallel ksampler"],
            inputs=[
                io.Combo.Input(
                    "add_noise",
                    options=["enable", "disable"],
                    tooltip="Add noise before sampling. Disable it to go on from another sampler.",
                ),
                io.Int.Input(
                    "noise_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The random seed of the noise: the same seed gives ComfyUI's own picture.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Steps of the whole denoising process."),
                io.Float.Input(
                    "cfg",
                    default=8.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How strongly to follow the prompt. At 1 the negative prompt is not computed.",
                ),
                io.Combo.Input(
                    "sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="The algorithm of the sampler."
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    tooltip="How noise is taken away from step to step.",
                ),
                RayActors.Input("ray_actors", tooltip="The model on its workers, from a Ray loader."),
                io.Conditioning.Input("positive", tooltip="What should be in the picture."),
                io.Conditioning.Input("negative", tooltip="What should not be in the picture."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise."),
                io.Int.Input("start_at_step", default=0, min=0, max=10000, tooltip="The first step to do."),
                io.Int.Input("end_at_step", default=10000, min=0, max=10000, tooltip="The step to end before."),
                io.Combo.Input(
                    "return_with_leftover_noise",
                    options=["disable", "enable"],
                    tooltip="Keep the noise that is left at the end step, for a sampler that goes on.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="How much of the denoising to do; below 1 keeps more of the latent.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The denoised latent."),
                RayActors.Output(display_name="ray_actors", tooltip="The same model, for a next sampler."),
            ],
        )

    @classmethod
    def execute(
        cls,
        add_noise: str,
        noise_seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        ray_actors: Any,
        positive: list[Any],
        negative: list[Any],
        latent_image: dict[str, Any],
        start_at_step: int,
        end_at_step: int,
        return_with_leftover_noise: str,
        denoise: float = 1.0,
    ) -> io.NodeOutput:
        # ComfyUI's module of that name; Raylight's own is never imported by its plain one.
        from nodes import common_ksampler

        (latent,) = common_ksampler(
            ray_actors,
            noise_seed,
            steps,
            cfg,
            sampler_name,
            scheduler,
            positive,
            negative,
            latent_image,
            denoise=denoise,
            disable_noise=add_noise == "disable",
            start_step=start_at_step,
            last_step=end_at_step,
            force_full_denoise=return_with_leftover_noise == "disable",
        )
        return io.NodeOutput(latent, ray_actors)


def _outputs() -> list[io.Output]:
    return [
        io.Latent.Output(display_name="latent", tooltip="The denoised latent."),
        RayActors.Output(display_name="ray_actors", tooltip="The same model, for a next sampler."),
    ]


def _stock(node_id: str) -> Any:
    # ComfyUI's module of that name; Raylight's own is never imported by its plain one.
    from nodes import NODE_CLASS_MAPPINGS

    return NODE_CLASS_MAPPINGS[node_id]


class XFuserSamplerCustom(io.ComfyNode):
    """Denoises a latent on the workers of a Ray model by any sampler and sigmas: ComfyUI's SamplerCustom."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="XFuserSamplerCustom",
            display_name="XFuser SamplerCustom",
            category=CATEGORY,
            description=cleandoc(cls.__doc__),
            search_aliases=["ray sampler custom", "multi gpu sampler"],
            inputs=[
                RayActors.Input("ray_actors", tooltip="The model on its workers, from a Ray loader."),
                io.Boolean.Input("add_noise", default=True, tooltip="Add noise before sampling."),
                io.Int.Input(
                    "noise_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The random seed of the noise.",
                ),
                io.Float.Input(
                    "cfg",
                    default=8.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How strongly to follow the prompt. At 1 the negative prompt is not computed.",
                ),
                io.Conditioning.Input("positive", tooltip="What should be in the picture."),
                io.Conditioning.Input("negative", tooltip="What should not be in the picture."),
                io.Sampler.Input("sampler", tooltip="The algorithm, from any sampler node."),
                io.Sigmas.Input("sigmas", tooltip="The noise levels, from any scheduler node."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise."),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls,
        ray_actors: Any,
        add_noise: bool,
        noise_seed: int,
        cfg: float,
        positive: list[Any],
        negative: list[Any],
        sampler: Any,
        sigmas: Any,
        latent_image: dict[str, Any],
    ) -> io.NodeOutput:
        output = _stock("SamplerCustom").execute(
            ray_actors, add_noise, noise_seed, cfg, positive, negative, sampler, sigmas, latent_image
        )
        return io.NodeOutput(output.result[0], ray_actors)


class XFuserSamplerCustomAdvanced(io.ComfyNode):
    """Denoises a latent on the workers of a Ray model by any guider: ComfyUI's SamplerCustomAdvanced.

    A guider that was made with another model samples the Ray model instead, with what was put on the other.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="XFuserSamplerCustomAdvanced",
            display_name="XFuser SamplerCustomAdvanced",
            category=CATEGORY,
            description=cleandoc(cls.__doc__),
            search_aliases=["ray sampler custom advanced", "multi gpu sampler"],
            inputs=[
                RayActors.Input("ray_actors", tooltip="The model on its workers, from a Ray loader."),
                io.Noise.Input("noise", tooltip="The noise, from any noise node."),
                io.Guider.Input("guider", tooltip="How prompts guide the sampling, from any guider node."),
                io.Sampler.Input("sampler", tooltip="The algorithm, from any sampler node."),
                io.Sigmas.Input("sigmas", tooltip="The noise levels, from any scheduler node."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise."),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls, ray_actors: Any, noise: Any, guider: Any, sampler: Any, sigmas: Any, latent_image: dict[str, Any]
    ) -> io.NodeOutput:
        guider = driver().guided_by(guider, ray_actors)
        output = _stock("SamplerCustomAdvanced").execute(noise, guider, sampler, sigmas, latent_image)
        return io.NodeOutput(output.result[0], ray_actors)
