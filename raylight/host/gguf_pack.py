"""The ComfyUI-GGUF pack: found in ComfyUI's process, and its reader and layers imported in a worker.

GGUF's formats are that pack's business: which tensors there are, and what their blocks of bytes mean. Workers load no
custom nodes, so they take the modules that they need from the pack's folder, without what registers its nodes.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

NODE = "UnetLoaderGGUF"
_TAKEN = {"loader": ("gguf_sd_loader",), "ops": ("GGMLOps", "GGMLTensor", "GGMLLayer"),
          "dequant": ("is_quantized", "dequantize_tensor")}


@dataclass(frozen=True, slots=True)
class GgufPack:
    """What workers use of the pack. `tensor` is its class of quantised tensors, `operations` its layers for ComfyUI's
    models, `layer` the class of those that know quantised weights."""

    name: str
    folder: str
    tensor: type
    layer: type
    operations: type
    is_quantized: Callable[[Any], bool]
    dequantize: Callable[..., Tensor]
    _read: Callable[[str], Any]

    def read(self, path: str) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """The tensors of a file, still in it, and its metadata where the pack tells it.

        Raises ValueError for whatever the pack does not understand.
        """
        try:
            found = self._read(path)
        except Exception as error:  # its reader walks through bytes, and fails in the ways of numpy and Python
            raise ValueError(f"ComfyUI-GGUF cannot read it: {type(error).__name__}: {error}") from error
        # Older versions return the tensors alone.
        tensors, extra = found if isinstance(found, tuple) else (found, {})
        return tensors, extra.get("metadata") if isinstance(extra, dict) else None


def find() -> str:
    """The folder of the pack that this ComfyUI has started with; empty where it has none."""
    # By its node, and not by its folder: people rename folders, and a pack can fail to start.
    nodes = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})
    if NODE not in nodes:
        return ""
    folder = os.path.dirname(os.path.abspath(inspect.getfile(nodes[NODE])))
    complete = all(os.path.isfile(os.path.join(folder, f"{module}.py")) for module in _TAKEN)
    return folder if complete else ""


@functools.cache
def open_pack(folder: str) -> GgufPack:
    """Import the pack in this process. Raises ValueError where it is not there, or not as it was."""
    if not os.path.isdir(folder):
        raise ValueError(f"ComfyUI-GGUF is not in {folder} on the machine of this worker")
    name = f"raylight_gguf_{hashlib.sha256(folder.encode()).hexdigest()[:8]}"
    package = ModuleType(name)
    package.__path__ = [folder]  # a package whose __init__, which registers nodes, does not run
    sys.modules[name] = package
    taken = {}
    for module, names in _TAKEN.items():
        try:
            imported = importlib.import_module(f"{name}.{module}")
        except Exception as error:  # of code that is not ours
            raise ValueError(f"{module}.py of ComfyUI-GGUF in {folder} cannot be imported: {error}") from error
        for one in names:
            if not hasattr(imported, one):
                raise ValueError(f"{module}.py of ComfyUI-GGUF in {folder} has no {one}, which Raylight needs: update "
                                 f"Raylight, or use the version of ComfyUI-GGUF that has it")
            taken[one] = getattr(imported, one)
    return GgufPack(name, folder, taken["GGMLTensor"], taken["GGMLLayer"], taken["GGMLOps"], taken["is_quantized"],
                    taken["dequantize_tensor"], taken["gguf_sd_loader"])
