"""Parallelize Model: the MODEL of any loader, from now on run by workers."""

from __future__ import annotations

from inspect import cleandoc

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from raylight.host.handles import Workers

from .engine import driver
from .options import all_workers
from .types import CATEGORY, RayActorsInit


class RayParallelizeModel(io.ComfyNode):
    """Has workers run a MODEL that any loader has loaded, with all that nodes have put on it.

    The workers read its file themselves where it is known, and get the weights from ComfyUI's memory where it is not.
    Put this node where the model goes to a sampler or a guider.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RayParallelizeModel",
            display_name="Parallelize Model (Ray)",
            category=CATEGORY,
            description=cleandoc(cls.__doc__),
            search_aliases=["multi gpu model", "ray model", "distribute model"],
            inputs=[
                io.Model.Input("model", tooltip="A model from Load Diffusion Model, Load Checkpoint, or a loader of "
                                                "another pack, with LoRAs and patches."),
                RayActorsInit.Input("ray_actors_init", optional=True,
                                    tooltip="The workers, from a Ray initializer. Without it: one for each GPU."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The same model, run by the workers.")],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, ray_actors_init: Workers | None = None) -> io.NodeOutput:
        return io.NodeOutput(driver().parallelize(model, ray_actors_init or all_workers()))
