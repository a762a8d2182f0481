"""A VAE on workers: from a file, or from another loader."""

from __future__ import annotations

from inspect import cleandoc
from typing import Any

import comfy.sd
import folder_paths
from comfy_api.latest import io

from raylight.driver.options import all_workers
from raylight.host.recipe import WorkerConfig

from .common import CATEGORY, RayActors, driver, stamp_of, workers_input
from .derived import call, inputs_like

_STOCK = "VAELoader"


def _both_workers_inputs() -> list[io.Input]:
    """Return the inputs for workers: of an initializer, or those of a model."""
    return [
        workers_input(optional=True),
        RayActors.Input(
            "ray_actors",
            optional=True,
            tooltip="A model from a Ray loader, in the place of ray_actors_init: the VAE runs on its workers.",
        ),
    ]


def _workers(ray_actors_init: WorkerConfig | None, ray_actors: Any) -> WorkerConfig:
    return ray_actors_init or (all_workers() if ray_actors is None else ray_actors.workers)


class RayVAELoaderAsVAE(io.ComfyNode):
    """Load a VAE on every worker and return a VAE for all of ComfyUI's nodes.

    Replaces Load VAE in any workflow. Each worker decodes and encodes a part of the rows, which gives the picture of
    one GPU, without tiles and their seams, in less time and with less memory on each GPU.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        (file,) = inputs_like(_STOCK)
        file.tooltip = "A file in models/vae or models/vae_approx."
        return io.Schema(
            node_id="RayVAELoaderAsVAE",
            display_name="Load VAE (Ray)",
            category=CATEGORY,
            description=cleandoc(cls.__doc__ or ""),
            search_aliases=["multi gpu vae", "parallel vae", "ray vae loader", "distributed vae decode"],
            inputs=[file, *_both_workers_inputs()],
            outputs=[io.Vae.Output(display_name="vae", tooltip="The VAE, for any node that takes a VAE.")],
        )

    @classmethod
    def fingerprint_inputs(cls, vae_name: str | None = None, **_: object) -> tuple[int, ...]:
        return stamp_of(vae_name, _path)

    @classmethod
    def execute(
        cls, vae_name: str, ray_actors_init: WorkerConfig | None = None, ray_actors: Any = None
    ) -> io.NodeOutput:
        workers, path = _workers(ray_actors_init, ray_actors), _path(vae_name)

        def read() -> comfy.sd.VAE:
            return call(_STOCK, {"vae_name": vae_name})[0]

        if path is None:
            return io.NodeOutput(driver().parallelize_vae(read(), workers))
        return io.NodeOutput(driver().load_vae(path, read, workers))


class RayParallelizeVAE(io.ComfyNode):
    """Run a VAE from any loader on the workers, such as that of a checkpoint, or one with patches.

    Workers read the VAE's file where it is known; otherwise they get the weights from ComfyUI's memory.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RayParallelizeVAE",
            display_name="Parallelize VAE (Ray)",
            category=CATEGORY,
            description=cleandoc(cls.__doc__ or ""),
            search_aliases=["multi gpu vae", "parallel vae", "ray vae", "distributed vae decode"],
            inputs=[io.Vae.Input("vae", tooltip="A VAE from any loader."), *_both_workers_inputs()],
            outputs=[io.Vae.Output(display_name="vae", tooltip="The same VAE, run by the workers.")],
        )

    @classmethod
    def execute(
        cls, vae: comfy.sd.VAE, ray_actors_init: WorkerConfig | None = None, ray_actors: Any = None
    ) -> io.NodeOutput:
        return io.NodeOutput(driver().parallelize_vae(vae, _workers(ray_actors_init, ray_actors)))


def _path(name: str) -> str | None:
    """Return the path of a VAE's file. None for one that ComfyUI makes of two files, or of none."""
    if name == "pixel_space" or (folder_paths.get_full_path("vae", name) is None and "." not in name):
        return None
    return folder_paths.get_full_path("vae", name) or folder_paths.get_full_path_or_raise("vae_approx", name)
