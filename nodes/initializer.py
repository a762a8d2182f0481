"""Ray Initializer, plain and advanced: which workers to use and how they split the work."""

from __future__ import annotations

from inspect import cleandoc
from typing import Any

from comfy_api.latest import io

from raylight.attention import kernels
from raylight.driver.options import AUTOMATIC, MOST, check_product, without_exchange, workers_from
from raylight.parallel import external_strategies, graphs

from .common import CATEGORY, RayActorsInit, begin_workers, show


def _inputs() -> dict[str, io.Input]:
    """Return the inputs of both initializers by name, in the order of the plain one."""

    def number(name: str, tooltip: str, default: int = AUTOMATIC, least: int = AUTOMATIC) -> io.Input:
        return io.Int.Input(name, default=default, min=least, max=MOST, tooltip=tooltip)

    def switch(name: str, tooltip: str) -> io.Input:
        return io.Boolean.Input(name, default=False, tooltip=tooltip, advanced=True)

    inputs = [
        io.String.Input(
            "ray_cluster_address",
            default="local",
            tooltip="local starts Ray on this machine, for this machine only. Or host:port of a running Ray cluster.",
        ),
        io.String.Input(
            "ray_cluster_namespace",
            default="default",
            advanced=True,
            tooltip="Ray namespace. Matters only when several programs share a cluster.",
        ),
        number(
            "GPU",
            "Number of workers, one per GPU. 0: all GPUs of this machine, or of the cluster; without any, two workers "
            "on the CPU.",
        ),
        number(
            "ulysses_degree",
            "Workers that split the tokens of one image or video (Ulysses). At most the model's attention heads. "
            "0: each run chooses by its batch: groups of workers take CFG rows and images, and the rest split tokens, "
            "unless cfg_degree or dp_degree is above 1. The node that samples shows the choice.",
        ),
        number(
            "ring_degree",
            "Workers that split tokens and pass keys and values around a ring. For more workers than attention heads, "
            "where ulysses_degree = 0 also chooses a ring.",
            default=1,
            least=1,
        ),
        number(
            "cfg_degree",
            "Groups of workers that split the CFG batch: positive and negative prompt. "
            "With ulysses_degree = 0, leave it at 1 to have it chosen.",
            default=1,
            least=1,
        ),
        number(
            "dp_degree",
            "Groups of workers that split a batch of images, or sample one image each (DP KSampler). "
            "0: what a given ulysses_degree leaves. GPU is ulysses x ring x cfg x dp. "
            "With ulysses_degree = 0, leave it at 1 to have it chosen.",
            default=1,
        ),
        switch("sync_ulysses", "No effect: exchanges are always ordered. Kept for saved workflows."),
        switch("clear_vram_after_sampling", "Free the model's GPU memory after each run. The next run starts slower."),
        switch(
            "FSDP",
            "Split the model's weights over the workers (FSDP), which gather one block at a time. "
            "For models that do not fit on one GPU.",
        ),
        switch(
            "FSDP_CPU_OFFLOAD",
            "Keep the split weights in system memory and copy each block to the GPU before it runs. Needs FSDP.",
        ),
        io.Combo.Input(
            "XFuser_attention",
            options=list(kernels.NAMES),
            default=kernels.AUTO,
            tooltip="Attention kernel, with one worker too. auto: the fastest exact one of PyTorch. TORCH choices need "
            "nothing installed; FA, FA3 and SAGE choices need their library.",
        ),
        switch("skip_comm_test", "Skip the GPU link test (under 3 s) when workers start for the first time."),
        switch("use_mmap", "No effect: model files are always memory-mapped. Kept for saved workflows."),
    ]
    return {i.id: i for i in inputs}


class _Initializer(io.ComfyNode):
    @classmethod
    def _schema(cls, node_id: str, display_name: str, aliases: list[str], inputs: list[io.Input]) -> io.Schema:
        for one in inputs:
            one.optional = True  # prompts of older forms lack some, which then have their defaults
        return io.Schema(
            node_id=node_id,
            display_name=display_name,
            category=CATEGORY,
            description=cleandoc(cls.__doc__),
            search_aliases=aliases,
            inputs=inputs,
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
        # ComfyUI repeats the answer at every input named here: only the factors of the product are.
        return check_product(GPU, ulysses_degree, ring_degree, cfg_degree, dp_degree)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return the default of each input."""
        return {one.id: getattr(one, "default", None) for one in cls.define_schema().inputs}

    @classmethod
    async def execute(cls, **inputs: Any) -> io.NodeOutput:
        # ComfyUI executes asynchronous nodes first: workers start while text encoder and VAE are loaded.
        workers, degrees = workers_from(cls.defaults() | inputs)
        begin_workers(workers)
        text = "\n".join(filter(None, (str(degrees), without_exchange(workers.strategy, degrees))))
        return io.NodeOutput(workers, ui=show(cls, text))


class RayInitializer(_Initializer):
    """Choose the workers, one per GPU, and how they split the work.

    By default all GPUs of this machine work on each image or video, and each run chooses how. Nodes show the choice.
    Workers start at once, while ComfyUI loads what else the prompt needs, and stay for the next prompt. Raylight Advice
    says what fits and what to expect of them.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        aliases = ["multi gpu", "multigpu", "ulysses", "ring attention", "sequence parallel", "fsdp"]
        aliases += ["workers", "raylight", "xdit"]
        return cls._schema("RayInitializer", "Ray Initializer", aliases, list(_inputs().values()))


class RayInitializerAdvanced(_Initializer):
    """Ray Initializer with a choice of GPUs and Ray's own settings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        select = io.String.Input("GPU_SELECT", default="", tooltip="GPU indices, such as 0,2. Empty: Ray chooses.")
        shared = _inputs() | {"GPU_SELECT": select}
        order = """
            ray_cluster_address ray_cluster_namespace GPU GPU_SELECT ulysses_degree ring_degree
            clear_vram_after_sampling cfg_degree dp_degree sync_ulysses FSDP FSDP_CPU_OFFLOAD XFuser_attention
            skip_comm_test use_mmap
        """
        own = [
            io.Float.Input(
                "ray_object_store_gb",
                default=2.0,
                min=0.1,
                max=1024.0,
                step=0.1,
                optional=True,
                tooltip="Shared memory for data between ComfyUI and the workers, in GB.",
            ),
            io.String.Input(
                "ray_dashboard_address",
                default="None",
                optional=True,
                advanced=True,
                tooltip="No effect: the dashboard is off. Kept for saved workflows.",
            ),
            io.String.Input(
                "torch_dist_address",
                default="127.0.0.1:29500",
                optional=True,
                advanced=True,
                tooltip="No effect: a free port is always chosen. Kept for saved workflows.",
            ),
            io.Combo.Input(
                "sequence_attention",
                options=list(external_strategies.NAMES),
                default=external_strategies.OURS,
                optional=True,
                advanced=True,
                tooltip="What exchanges tokens for attention. yunchang and xfuser need equal shards and no masks; "
                "Raylight does the other calls. raylight_int8: Raylight in 8 bits, half the bytes for slow links, at "
                "the cost of another picture. The node that samples shows the error.",
            ),
            io.Combo.Input(
                "cuda_graphs",
                options=list(graphs.NAMES),
                default=graphs.AUTO,
                optional=True,
                advanced=True,
                tooltip="Replay the model's forward as one CUDA graph from its third call on. auto: where launching it "
                "takes long. on: wherever it can be. off: never.",
            ),
        ]
        return cls._schema(
            "RayInitializerAdvanced",
            "Ray Initializer (Advanced)",
            ["multi gpu", "select gpu", "sequence parallel", "ray cluster", "raylight"],
            [*(shared[name] for name in order.split()), *own],
        )
