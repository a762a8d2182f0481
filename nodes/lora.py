"""Ray LoRA loader: a LoRA for the model of a Ray loader, or a chain of them."""

from __future__ import annotations

from inspect import cleandoc

import folder_paths
from comfy_api.latest import io

from raylight.host.recipe import LoraRecipe, stamp

from .types import CATEGORY, RayLora

FOLDER = "loras"


class RayLoraLoader(io.ComfyNode):
    """Names a LoRA, LoHa, LoKr, DoRA, OFT or the like that the Ray loader puts on its model.

    Several are chained by prev_ray_lora. A changed strength or set of LoRAs does not read the model again.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RayLoraLoader",
            display_name="Load LoRA (Ray)",
            category=CATEGORY,
            description=cleandoc(cls.__doc__),
            search_aliases=["ray lora", "multi gpu lora"],
            inputs=[
                io.Combo.Input("lora_name", options=folder_paths.get_filename_list(FOLDER),
                               tooltip="A file in models/loras."),
                io.Float.Input("strength_model", default=1.0, min=-100.0, max=100.0, step=0.01,
                               tooltip="How strongly to change the diffusion model; it may be negative, and at 0 the "
                                       "LoRA is left out."),
                RayLora.Input("prev_ray_lora", optional=True, tooltip="LoRAs to put on the model before this one."),
            ],
            outputs=[RayLora.Output(display_name="ray_lora", tooltip="The LoRAs, for the Ray loader or another of "
                                                                     "these nodes.")],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_: object) -> tuple[int, int, int, int]:
        # A file replaced under the same name is another LoRA.
        return stamp(folder_paths.get_full_path_or_raise(FOLDER, lora_name))

    @classmethod
    def execute(cls, lora_name: str, strength_model: float,
                prev_ray_lora: tuple[LoraRecipe, ...] = ()) -> io.NodeOutput:
        if strength_model == 0:
            return io.NodeOutput(prev_ray_lora)
        path = folder_paths.get_full_path_or_raise(FOLDER, lora_name)
        return io.NodeOutput((*prev_ray_lora, LoraRecipe.of(path, strength_model)))
