"""ComfyUI's settings, sent to the workers.

A worker never runs ComfyUI's `main.py`: what that parses and sets up is captured in ComfyUI's process, and applied in
the worker before the first import of a module that reads it.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import other_machine

# What the import of ComfyUI and of Raylight's workers takes most of its time for: libraries, but not those that ComfyUI
# imports late (`comfy_patches.late_imports`), and Raylight's modules that need PyTorch alone. The first step of most
# models needs PyTorch's compiler: ComfyUI's kernels are operators that it must not look into. None starts CUDA or a
# thread. One that is not there is left out.
LIBRARIES = tuple(
    """
    torch torch._dynamo torch.distributed.tensor numpy safetensors.torch einops PIL.Image psutil tqdm yaml
    raylight.parallel.degrees raylight.parallel.graphs raylight.parallel.hooks raylight.parallel.process_group
    raylight.parallel.rows.engine raylight.parallel.speed_trial raylight.plans.draft.proof raylight.sharding.fsdp
    raylight.sharding.gathering raylight.sharding.shard_reader raylight.sharding.staged_read
    raylight.sharding.subclass_weights
    """.split()
)
# One that looks for GPUs when it is imported.
LIBRARIES_FOR_GPUS = ("comfy_kitchen",)
# Arguments of ComfyUI that name folders and files of its machine.
_FOLDER_ARGUMENTS = (
    "base_directory",
    "models_directory",
    "output_directory",
    "temp_directory",
    "input_directory",
    "user_directory",
    "extra_model_paths_config",
)
# Options by which ComfyUI does not capture CUDA graphs of a model's blocks: 0.33 has the first, later ones both. Ranks
# would have to capture the collectives in them together, and Raylight captures graphs of its own.
OWN_GRAPHS_OFF = ("disable_cuda_graphs", "disable_comfy_compiler")
PACK_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class HostSettings:
    """The parsed command line and the model folders of the ComfyUI that started the workers, and the `gpu_identity` of
    the GPU that it uses itself. `machine` is the identity of its machine, and `versions` are those by which workers on
    others must be alike, none where there are no others.
    """

    arguments: dict[str, Any]
    model_folders: dict[str, tuple[tuple[str, ...], frozenset[str]]] = field(default_factory=dict)
    gpu: str = ""
    machine: str = ""
    versions: dict[str, str] = field(default_factory=dict)


def comfy_root() -> str:
    """Return the folder of the ComfyUI in whose process this runs."""
    import comfy.options  # this module must be importable before ComfyUI is set up

    return str(Path(comfy.options.__file__).resolve().parents[1])


def python_path() -> tuple[str, ...]:
    """Return where workers find ComfyUI and this pack. ComfyUI first: both have a module named `nodes`."""
    return comfy_root(), str(PACK_ROOT)


def capture(is_local: bool) -> HostSettings:
    """Return the settings of this process, for workers of this machine, or of several ones if not `is_local`."""
    import comfy.model_management
    import folder_paths
    from comfy.cli_args import args

    from .gpu_identity import gpu_identity

    folders = {
        name: (tuple(os.path.abspath(path) for path in paths), frozenset(extensions))
        for name, (paths, extensions) in folder_paths.folder_names_and_paths.items()
    }
    gpu = gpu_identity(comfy.model_management.get_torch_device())
    versions = {} if is_local else other_machine.versions()  # reads all of Raylight's code
    return HostSettings(dict(vars(args)), folders, gpu, other_machine.identity(), versions)


def apply(settings: HostSettings, device_type: str) -> None:
    """Set ComfyUI up in a worker, before any other import of ComfyUI in its process.

    Raises RuntimeError: when ComfyUI was imported before. Raises ValueError: on another machine than that of ComfyUI's
    process, when this one has other versions.
    """
    if "comfy.model_management" in sys.modules:
        raise RuntimeError("ComfyUI was imported in this worker before its settings were applied")
    from comfy.cli_args import args

    vars(args).update(settings.arguments)
    args.cpu = device_type == "cpu"
    # The worker's one GPU is chosen by Ray; the driver's choice of device is not the worker's.
    args.cuda_device = args.default_device = None
    is_other = settings.machine not in ("", other_machine.identity())
    if is_other:
        other_machine.check_versions(settings.versions)
        for name in _FOLDER_ARGUMENTS:
            if hasattr(args, name):
                setattr(args, name, None)
    for name in OWN_GRAPHS_OFF:
        if hasattr(args, name):
            setattr(args, name, True)

    import folder_paths

    if is_other:
        other_machine.add_model_folders(settings.model_folders)
        return

    folder_paths.folder_names_and_paths.update(
        {name: (list(paths), set(extensions)) for name, (paths, extensions) in settings.model_folders.items()}
    )
