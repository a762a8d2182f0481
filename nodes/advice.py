"""Raylight Advice: how to run a model at a size on these GPUs."""

from __future__ import annotations

import math
from inspect import cleandoc
from typing import Any

from comfy_api.latest import io, ui

from raylight.driver.options import all_workers
from raylight.host import gguf
from raylight.host.recipe import ModelRecipe, RayModel, WorkerConfig

from .common import CATEGORY, driver, workers_input
from .loaders import model_files, model_path


class RaylightAdvice(io.ComfyNode):
    """Say how to run a model file at a size on these GPUs: what fits, which degrees, what speed to expect.

    Starts no workers and reads no weights. What it expects gets better with workers that run, as their links and speeds
    are known then; the last runs of the file are shown beside it.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RaylightAdvice",
            display_name="Raylight Advice",
            category=CATEGORY,
            description=cleandoc(cls.__doc__),
            search_aliases=["ray advice", "multi gpu advice", "does it fit", "which degrees", "expected speed"],
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=model_files(),
                    tooltip="The model file, in models/diffusion_models or models/checkpoints.",
                ),
                io.Int.Input("width", default=1024, min=16, max=16384, step=8, tooltip="Width in pixels."),
                io.Int.Input("height", default=1024, min=16, max=16384, step=8, tooltip="Height in pixels."),
                io.Int.Input("frames", default=1, min=1, max=16384, tooltip="Frames of a video; 1 for a picture."),
                workers_input(optional=True),
                io.AnyType.Input("after", optional=True, tooltip="Anything that has to be ready first."),
            ],
            outputs=[io.String.Output(display_name="advice", tooltip="The same text.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return math.nan  # never equal: what was measured since may have changed it

    @classmethod
    def execute(
        cls,
        unet_name: str,
        width: int,
        height: int,
        frames: int,
        ray_actors_init: WorkerConfig | None = None,
        after: Any = None,
    ) -> io.NodeOutput:
        workers = ray_actors_init or all_workers()
        recipe = ModelRecipe.of(model_path(unet_name), "default", workers.sharding, gguf_pack=gguf.find())
        text = driver().advise(RayModel(workers, recipe), width, height, frames)
        return io.NodeOutput(text, ui=ui.PreviewText(text))
