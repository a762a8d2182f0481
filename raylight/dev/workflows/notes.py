"""The note of each template: which degrees to choose, how much memory they need, and where to get the files."""

from __future__ import annotations

from collections.abc import Sequence

from .models import DiffusionFile, ModelFile

COUNTS = (2, 4, 8)
# Of model files, in the order of the note.
FOLDERS = (
    "diffusion_models",
    "checkpoints",
    "text_encoders",
    "vae",
    "clip_vision",
    "latent_upscale_models",
    "loras",
    "controlnet",
)
_HOW = (
    "*Computed, not measured: number of weights x bytes of their type{more}. What the image or video needs during "
    "a step comes on top (less of it on each GPU, the more GPUs share it), and on ComfyUI's own GPU the text "
    "encoder and the VAE.*"
)


def about(title: str, text: str, files: Sequence[ModelFile], degrees: str) -> str:
    """Return the full note."""
    return f"# {title}\n\n{text}\n\n{degrees}\n\n{_links(files)}"


def usp(files: Sequence[DiffusionFile], *, uses_cfg: bool) -> str:
    """Return degrees for sequence parallelism; `uses_cfg` if a step also computes a negative prompt."""
    most = min(file.architecture.heads for file in files)
    rows = [(str(n), str(n), *([f"2 x {n // 2}"] if uses_cfg else []), _size(_whole(files))) for n in COUNTS]
    head = ("GPUs", "ulysses_degree", *(["or cfg x ulysses"] if uses_cfg else []), "Weights on each GPU")
    text = (
        f"With `GPU` and `ulysses_degree` at 0, all GPUs share each step, as below. `ulysses_degree` can be up to "
        f"{most}, the model's attention heads; let `ring_degree` take more."
    )
    if uses_cfg:
        text += (
            " `cfg_degree` 2 gives the positive and the negative prompt to one half of the GPUs each, which "
            "exchange less."
        )
    return _section(text, head, rows, _HOW.format(more=_pair(files)) + _smaller(files))


def cfg(files: Sequence[DiffusionFile]) -> str:
    rows = [(str(n), "2", str(n // 2), _size(_whole(files))) for n in COUNTS]
    text = (
        "`cfg_degree` 2 makes two groups of GPUs: one computes the positive prompt, one the negative. They "
        "exchange nothing during a step, so this needs no fast connection between the two. `ulysses_degree` 0 has "
        "the GPUs of a group share its tokens. It takes an even number of GPUs, and `cfg` above 1 in the sampler."
    )
    return _section(
        text, ("GPUs", "cfg_degree", "ulysses_degree", "Weights on each GPU"), rows, _HOW.format(more=_pair(files))
    )


def fsdp(files: Sequence[DiffusionFile]) -> str:
    rows = [(str(n), str(n), _size(_split(files, n)), _size(_whole(files))) for n in COUNTS]
    text = (
        "`FSDP` is on: each GPU keeps only its part of the weights, and gathers one block at a time, one block "
        "ahead. All GPUs share the tokens as well."
    )
    return _section(
        text,
        ("GPUs", "ulysses_degree", "Weights on each GPU", "without FSDP"),
        rows,
        _HOW.format(more=", divided by the GPUs, and the two largest blocks whole"),
    )


def offload(files: Sequence[DiffusionFile]) -> str:
    rows = [
        (
            str(n),
            str(n),
            _size(max(file.offloaded_gib for file in files)),
            _size(_split(files, n)),
            _size(_whole(files)),
        )
        for n in COUNTS
    ]
    text = (
        "`FSDP` and `FSDP_CPU_OFFLOAD` are on: system memory holds the model once, a part by each worker, and "
        "blocks come to the GPU just before they run. That takes time in each step: it is for GPUs that are too "
        "small for FSDP alone."
    )
    return _section(
        text,
        ("GPUs", "ulysses_degree", "Weights on each GPU", "FSDP alone", "In system memory"),
        rows,
        _HOW.format(more="; on the GPU are two blocks, and the weights of no block"),
    )


def data_parallel(files: Sequence[DiffusionFile], images: int) -> str:
    rows = [(str(n), "1", str(n), f"{min(n, images)} of {images}", _size(_whole(files))) for n in COUNTS]
    text = (
        f"Each GPU makes an image of its own, with its own prompt and noise: {images} here, as many as are "
        "connected to the two lists, up to 8. `dp_degree` 0 takes all GPUs. With 8 GPUs and fewer images, set "
        "`ulysses_degree` to 2: two GPUs then share each image."
    )
    return _section(
        text,
        ("GPUs", "ulysses_degree", "dp_degree", "Images at once", "Weights on each GPU"),
        rows,
        _HOW.format(more=""),
    )


def drop_in(files: Sequence[DiffusionFile]) -> str:
    text = (
        "Without a Ray Initializer, there is one worker for each GPU of this machine, and all share each step. "
        "Connect one to `ray_actors_init` to choose how many, FSDP or another attention."
    )
    return _section(
        text,
        ("GPUs", "ulysses", "Weights on each GPU"),
        [(str(n), str(n), _size(_whole(files))) for n in COUNTS],
        _HOW.format(more="") + _smaller(files),
    )


def _whole(files: Sequence[DiffusionFile]) -> float:
    return sum(file.whole_gib for file in files)


def _split(files: Sequence[DiffusionFile], workers: int) -> float:
    """Return the size of a GPU's shards of all models, with the gathered blocks of the one that runs."""
    return sum(file.whole_gib / workers for file in files) + max(file.gathered_gib for file in files)


def _size(gib: float) -> str:
    return f"{gib:.1f} GiB"


def _pair(files: Sequence[DiffusionFile]) -> str:
    return "" if len(files) == 1 else ", of both models; where a GPU cannot hold both, one waits in system memory"


def _smaller(files: Sequence[DiffusionFile]) -> str:
    parts = ", ".join(f"{_size(_split(files, n))} on {n}" for n in COUNTS)
    return f"\n\nToo much for your GPUs? Switch `FSDP` on in the Ray Initializer: {parts} GPUs."


def _section(text: str, head: tuple[str, ...], rows: Sequence[tuple[str, ...]], how: str) -> str:
    lines = [" | ".join(head), "|".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    table = "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)
    return f"## Degrees and memory\n\n{text}\n\n{table}\n\n{how}"


def _links(files: Sequence[ModelFile]) -> str:
    lines = ["## Model files"]
    for folder in FOLDERS:
        of_folder = [file for file in files if file.directory == folder]
        if of_folder:
            lines += ["", f"**models/{folder}**", ""]
            lines += [_link(file) for file in of_folder]
    return "\n".join(lines) + "\n"


def _link(file: ModelFile) -> str:
    size = f", {file.dtype}" if isinstance(file, DiffusionFile) else ""
    renamed = "" if file.path.endswith(file.name) else f" (save it as `{file.name}`)"
    return f"- [{file.name}]({file.url}){renamed}{size}"
