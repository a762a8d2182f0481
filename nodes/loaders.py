"""Nodes that give a model on workers."""

from __future__ import annotations

from inspect import cleandoc

import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from raylight.driver.options import all_workers
from raylight.host import gguf
from raylight.host.recipe import (
    WEIGHT_DTYPES,
    LoraRecipe,
    ModelRecipe,
    RayModel,
    WorkerConfig,
    is_gguf,
    needs_pack,
    stamp,
)

from .common import CATEGORY, RayActors, RayActorsInit, RayLora, driver

FOLDERS = ("diffusion_models", "checkpoints")
GGUF_FOLDER = "unet_gguf"  # of ComfyUI-GGUF, where it is installed


class RayUNETLoader(io.ComfyNode):
    """Loads a diffusion model on every worker, split by sequence over them.

    With FSDP switched on in the initializer each worker keeps a part of the weights only.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RayUNETLoader",
            display_name="Load Diffusion Model (Ray)",
            category=CATEGORY,
            description=cleandoc(cls.__doc__),
            search_aliases=["ray unet loader", "multi gpu model"],
            inputs=[
                *_file_inputs(),
                RayActorsInit.Input("ray_actors_init", tooltip="The workers, from a Ray initializer."),
                _lora_input(),
            ],
            outputs=[RayActors.Output(display_name="ray_actors", tooltip="The model on its workers.")],
        )

    @classmethod
    def validate_inputs(cls, unet_name: str | None = None) -> bool | str:
        return _check(unet_name)

    @classmethod
    def fingerprint_inputs(cls, unet_name: str, **_: object) -> tuple[int, int, int, int]:
        return _fingerprint(unet_name)

    @classmethod
    def execute(
        cls, unet_name: str, weight_dtype: str, ray_actors_init: WorkerConfig, lora: tuple[LoraRecipe, ...] = ()
    ) -> io.NodeOutput:
        return io.NodeOutput(_load(unet_name, weight_dtype, ray_actors_init, lora))


class RayModelLoader(io.ComfyNode):
    """Loads a diffusion model on every worker and gives a MODEL for all of ComfyUI's nodes.

    Samplers, guiders, LoRA loaders and nodes that patch a model work with it as with any other; the workers do the
    work. It takes the place of Load Diffusion Model in any workflow.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RayModelLoader",
            display_name="Load Diffusion Model as MODEL (Ray)",
            category=CATEGORY,
            description=cleandoc(cls.__doc__),
            search_aliases=["multi gpu model loader", "ray unet loader", "parallel model"],
            inputs=[
                *_file_inputs(),
                RayActorsInit.Input(
                    "ray_actors_init",
                    optional=True,
                    tooltip="The workers, from a Ray initializer. Without it: one for each GPU.",
                ),
                _lora_input(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model, for any node that takes a MODEL.")],
        )

    @classmethod
    def validate_inputs(cls, unet_name: str | None = None) -> bool | str:
        return _check(unet_name)

    @classmethod
    def fingerprint_inputs(cls, unet_name: str, **_: object) -> tuple[int, int, int, int]:
        return _fingerprint(unet_name)

    @classmethod
    def execute(
        cls,
        unet_name: str,
        weight_dtype: str,
        ray_actors_init: WorkerConfig | None = None,
        lora: tuple[LoraRecipe, ...] = (),
    ) -> io.NodeOutput:
        return io.NodeOutput(_load(unet_name, weight_dtype, ray_actors_init or all_workers(), lora))


def _file_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "unet_name",
            options=_files(),
            tooltip="A model file in models/diffusion_models or models/checkpoints; .gguf files where "
            "ComfyUI-GGUF is installed.",
        ),
        io.Combo.Input(
            "weight_dtype",
            options=list(WEIGHT_DTYPES),
            default="default",
            tooltip="The type that weights are kept in. 'default' takes what the file has, as far as the "
            "GPU can use it. GGUF files take no other.",
        ),
    ]


def _lora_input() -> io.Input:
    return RayLora.Input("lora", optional=True, tooltip="LoRAs for the model, from a Ray LoRA loader.")


def _load(name: str, weight_dtype: str, workers: WorkerConfig, loras: tuple[LoraRecipe, ...]) -> ModelPatcher:
    recipe = ModelRecipe.of(_path(name), weight_dtype, workers.sharding, loras, gguf.find())
    return driver().load(RayModel(workers, recipe))


def _check(name: str | None) -> bool | str:
    """True, or what is wrong; a linked input is None and is judged when the node runs."""
    # Without this ComfyUI would only say that a GGUF file is not in a list.
    if name is None or name in _files():
        return True
    if is_gguf(name) and not gguf.find():
        return needs_pack(name)
    return f"there is no model file {name}"


def _fingerprint(name: str) -> tuple[int, int, int, int]:
    """A file replaced under the same name is another model."""
    return stamp(_path(name))


def _folders() -> tuple[str, ...]:
    return FOLDERS + ((GGUF_FOLDER,) if GGUF_FOLDER in folder_paths.folder_names_and_paths else ())


def _files() -> list[str]:
    return list(dict.fromkeys(name for folder in _folders() for name in folder_paths.get_filename_list(folder)))


def _path(name: str) -> str:
    """The full path of a model file. Raises FileNotFoundError, naming where it was looked for."""
    for folder in _folders():
        path = folder_paths.get_full_path(folder, name)
        if path is not None:
            return path
    places = ", ".join(path for folder in FOLDERS for path in folder_paths.get_folder_paths(folder))
    raise FileNotFoundError(f"the model file {name} is not in {places}")


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
                io.Combo.Input(
                    "lora_name", options=folder_paths.get_filename_list(FOLDER), tooltip="A file in models/loras."
                ),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="How strongly to change the diffusion model; it may be negative, and at 0 the "
                    "LoRA is left out.",
                ),
                RayLora.Input("prev_ray_lora", optional=True, tooltip="LoRAs to put on the model before this one."),
            ],
            outputs=[
                RayLora.Output(
                    display_name="ray_lora", tooltip="The LoRAs, for the Ray loader or another of these nodes."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_: object) -> tuple[int, int, int, int]:
        # A file replaced under the same name is another LoRA.
        return stamp(folder_paths.get_full_path_or_raise(FOLDER, lora_name))

    @classmethod
    def execute(
        cls, lora_name: str, strength_model: float, prev_ray_lora: tuple[LoraRecipe, ...] = ()
    ) -> io.NodeOutput:
        if strength_model == 0:
            return io.NodeOutput(prev_ray_lora)
        path = folder_paths.get_full_path_or_raise(FOLDER, lora_name)
        return io.NodeOutput((*prev_ray_lora, LoraRecipe.of(path, strength_model)))


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
                io.Model.Input(
                    "model",
                    tooltip="A model from Load Diffusion Model, Load Checkpoint, or a loader of "
                    "another pack, with LoRAs and patches.",
                ),
                RayActorsInit.Input(
                    "ray_actors_init",
                    optional=True,
                    tooltip="The workers, from a Ray initializer. Without it: one for each GPU.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The same model, run by the workers.")],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, ray_actors_init: WorkerConfig | None = None) -> io.NodeOutput:
        return io.NodeOutput(driver().parallelize(model, ray_actors_init or all_workers()))
