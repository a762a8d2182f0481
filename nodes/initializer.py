"""Ray initializer, plain and advanced: which workers to use and how they share the work."""

from __future__ import annotations

from inspect import cleandoc
from typing import Any

from comfy_api.latest import io

from raylight.attention import kernels
from raylight.driver.options import AUTOMATIC, MOST, check_product, workers_from
from raylight.parallel import external_strategies

from .common import CATEGORY, RayActorsInit, show


def _address() -> io.Input:
    return io.String.Input(
        "ray_cluster_address",
        default="local",
        tooltip="'local' starts Ray on this machine, reachable from this machine only. Or the host:port of a running "
        "Ray cluster.",
    )


def _namespace() -> io.Input:
    return io.String.Input(
        "ray_cluster_namespace",
        default="default",
        advanced=True,
        tooltip="Ray namespace. Matters only when several programs share one cluster.",
    )


def _workers() -> io.Input:
    return io.Int.Input(
        "GPU",
        default=AUTOMATIC,
        min=AUTOMATIC,
        max=MOST,
        tooltip="How many workers: one per GPU. 0 takes all GPUs of this machine, or those that GPU_SELECT names. On a "
        "machine without a GPU this many CPU workers are started, and two for 0.",
    )


def _degree(name: str, default: int, minimum: int, tooltip: str) -> io.Input:
    return io.Int.Input(name, default=default, min=minimum, max=MOST, tooltip=tooltip)


def _ulysses() -> io.Input:
    return _degree(
        "ulysses_degree",
        AUTOMATIC,
        AUTOMATIC,
        "Workers that split the tokens of one image or video among them (Ulysses). Any number up to the "
        "model's attention heads; 0 takes all workers that ring_degree, cfg_degree and dp_degree leave.",
    )


def _ring() -> io.Input:
    return _degree(
        "ring_degree",
        1,
        1,
        "Workers that pass keys and values around in a ring and split no heads: for "
        "more workers than the model has heads.",
    )


def _cfg() -> io.Input:
    return _degree(
        "cfg_degree",
        1,
        1,
        "Groups of workers that share positive and negative prompt between them, or "
        "any other batch. A batch too small for it is split by tokens instead.",
    )


def _dp() -> io.Input:
    return _degree(
        "dp_degree",
        1,
        0,
        "Groups of workers that share the images of a batch between them, or each make "
        "one of several (DP KSampler); 0 takes what a given ulysses_degree leaves over. "
        "GPU is ulysses x ring x cfg x dp.",
    )


def _flag(name: str, tooltip: str) -> io.Input:
    return io.Boolean.Input(name, default=False, tooltip=tooltip, advanced=True)


def _flags() -> dict[str, io.Input]:
    return {
        "sync_ulysses": _flag("sync_ulysses", "Has no effect: exchanges are always ordered. Kept for saved workflows."),
        "clear": _flag(
            "clear_vram_after_sampling",
            "Move the model out of GPU memory after each run: more room until the next, which is slower.",
        ),
        "fsdp": _flag(
            "FSDP",
            "Split the model's weights over the workers (FSDP2): each keeps its part "
            "only, and they gather one block at a time. For models that do not fit on one GPU.",
        ),
        "offload": _flag(
            "FSDP_CPU_OFFLOAD",
            "Keep the split weights in system memory, and copy a block to the GPU just before it runs. Needs FSDP.",
        ),
        "attention": io.Combo.Input(
            "XFuser_attention",
            options=list(kernels.NAMES),
            default=kernels.AUTO,
            tooltip="What computes attention on each worker. auto takes the fastest exact one that works on the GPU. "
            "The TORCH choices need nothing installed; FA, FA3 and the SAGE choices need their library.",
        ),
        "skip": _flag(
            "skip_comm_test",
            "Do not try the ways between the workers when they start for the first time. "
            "The try takes under 3 seconds, and finds GPUs that cannot talk to each other.",
        ),
        "mmap": _flag("use_mmap", "Has no effect: model files are always memory-mapped. Kept for saved workflows."),
    }


class RayInitializer(io.ComfyNode):
    """Chooses the workers, one per GPU, and how they share the work.

    As it is: all GPUs of this machine split the tokens of one image or video. What was chosen is shown on the node.
    Workers start when a model is loaded on them, and stay for the next prompt.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        flags = _flags()
        return io.Schema(
            node_id="RayInitializer",
            display_name="Ray Initializer",
            category=CATEGORY,
            description=cleandoc(cls.__doc__),
            search_aliases=[
                "multi gpu",
                "multigpu",
                "ulysses",
                "ring attention",
                "sequence parallel",
                "fsdp",
                "workers",
                "raylight",
                "xdit",
            ],
            inputs=[
                _address(),
                _namespace(),
                _workers(),
                _ulysses(),
                _ring(),
                _cfg(),
                _dp(),
                flags["sync_ulysses"],
                flags["clear"],
                flags["fsdp"],
                flags["offload"],
                flags["attention"],
                flags["skip"],
                flags["mmap"],
            ],
            outputs=[RayActorsInit.Output(display_name="ray_actors_init", tooltip="The workers, for a Ray loader.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls,
        GPU: int | None = None,
        ulysses_degree: int | None = None,
        ring_degree: int | None = None,
        cfg_degree: int | None = None,
        dp_degree: int | None = None,
    ) -> bool | str:
        # ComfyUI repeats the answer at every input named here, so only those of the product are.
        return check_product(GPU, ulysses_degree, ring_degree, cfg_degree, dp_degree)

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        workers, degrees = workers_from(inputs)
        return io.NodeOutput(workers, ui=show(cls, str(degrees)))


class RayInitializerAdvanced(io.ComfyNode):
    """Ray Initializer with the choice of GPUs and the settings of Ray itself."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        flags = _flags()
        return io.Schema(
            node_id="RayInitializerAdvanced",
            display_name="Ray Initializer (Advanced)",
            category=CATEGORY,
            description=cleandoc(cls.__doc__),
            search_aliases=["multi gpu", "select gpu", "sequence parallel", "ray cluster", "raylight"],
            inputs=[
                _address(),
                _namespace(),
                _workers(),
                io.String.Input(
                    "GPU_SELECT", default="", tooltip="Which GPUs, by index, such as 0,2. Empty: Ray chooses."
                ),
                _ulysses(),
                _ring(),
                flags["clear"],
                _cfg(),
                _dp(),
                flags["sync_ulysses"],
                flags["fsdp"],
                flags["offload"],
                flags["attention"],
                flags["skip"],
                flags["mmap"],
                io.Float.Input(
                    "ray_object_store_gb",
                    default=2.0,
                    min=0.1,
                    max=1024.0,
                    step=0.1,
                    optional=True,
                    tooltip="Shared memory for what travels between ComfyUI and the workers, in GB.",
                ),
                io.String.Input(
                    "ray_dashboard_address",
                    default="None",
                    optional=True,
                    advanced=True,
                    tooltip="Has no effect: the dashboard is off. Kept for saved workflows.",
                ),
                io.String.Input(
                    "torch_dist_address",
                    default="127.0.0.1:29500",
                    optional=True,
                    advanced=True,
                    tooltip="Has no effect: a free port is always chosen. Kept for saved workflows.",
                ),
                io.Combo.Input(
                    "sequence_attention",
                    options=list(external_strategies.NAMES),
                    default=external_strategies.OURS,
                    optional=True,
                    advanced=True,
                    tooltip="What exchanges tokens around attention. yunchang and xfuser take equal pieces "
                    "without masks; Raylight's own does the calls that they do not take.",
                ),
            ],
            outputs=[RayActorsInit.Output(display_name="ray_actors_init", tooltip="The workers, for a Ray loader.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls,
        GPU: int | None = None,
        ulysses_degree: int | None = None,
        ring_degree: int | None = None,
        cfg_degree: int | None = None,
        dp_degree: int | None = None,
    ) -> bool | str:
        # ComfyUI repeats the answer at every input named here, so only those of the product are.
        return check_product(GPU, ulysses_degree, ring_degree, cfg_degree, dp_degree)

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        workers, degrees = workers_from(inputs)
        return io.NodeOutput(workers, ui=show(cls, str(degrees)))
