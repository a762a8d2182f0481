"""Files of tensors, read as ComfyUI reads them in its own process, with the tensors still in the mapped file.

With DynamicVRAM ComfyUI has a reader of its own for .safetensors, which takes each tensor from where the header says
that it is. Else, and in workers, it uses the safetensors package, which refuses files with bytes that belong to no
tensor. What either takes is taken here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from typing import Any

import comfy.utils
import torch
from safetensors import SafetensorError
from torch import Tensor

_ENDINGS = (".safetensors", ".sft")
_LENGTH_BYTES = 8  # of the header's length, little-endian, at the begin of the file
# By their names in a header; what is missing here is missing in older versions of PyTorch.
_DTYPES = {
    name: getattr(torch, dtype)
    for name, dtype in {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U8": "uint8",
        "U16": "uint16",
        "U32": "uint32",
        "U64": "uint64",
        "BOOL": "bool",
        "C64": "complex64",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E8M0": "float8_e8m0fnu",
    }.items()
    if hasattr(torch, dtype)
}


def tolerant(read: Callable[..., Any]) -> Callable[..., Any]:
    """ComfyUI's `load_torch_file`, `read`, that goes by the header alone where the safetensors package refuses a file.

    What it returns raises what `read` raises, for a file that has none of its tensors where it says.
    """

    def read_either(path: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return read(path, *args, **kwargs)
        except Exception as error:  # of safetensors, pickle, zip, the system: whatever the file is instead
            if not path.lower().endswith(_ENDINGS):
                raise
            try:
                tensors, metadata = _by_header(path)
            except (ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError, OverflowError):
                raise error from None
        return (tensors, metadata) if kwargs.get("return_metadata") else tensors

    return read_either


def read(path: str) -> dict[str, Tensor]:
    """The tensors of a file by name, memory-mapped where the format allows it. Raises as `tolerant`."""
    return tolerant(comfy.utils.load_torch_file)(path, safe_load=True)


def _by_header(path: str) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Take each tensor from where the header says, whatever else is in the file. Raises ValueError, KeyError or
    TypeError for a header that cannot be so."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        begin = _LENGTH_BYTES + length
        if begin > size:
            raise ValueError("the header is longer than the file")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None)
    mapped = torch.UntypedStorage.from_file(path, False, size)  # private: nothing is written to the file
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        if not 0 <= start <= end <= size - begin or end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"the tensor {name} is not where the header says")
        # A storage for each, as by safetensors: then a tensor may begin at any byte.
        tensors[name] = torch.empty(0, dtype=dtype).set_(mapped[begin + start : begin + end], 0, shape)
        if getattr(comfy.utils, "DISABLE_MMAP", False):
            tensors[name] = tensors[name].clone()
    return tensors, metadata


def in_words(error: Exception) -> str:
    """An error of a reader, in words: many name no more than a key or an index."""
    if isinstance(error, KeyError):
        key = error.args[0]
        if isinstance(key, str) and "." in key:
            return f"the tensor {key} is missing"
        return f"ComfyUI looks for {key!r} in it, and that is not there or not known"
    if isinstance(error, EOFError):
        return "it ends too early"
    told = isinstance(error, (ValueError, RuntimeError, OSError, SafetensorError))
    return str(error) if told and str(error) else f"{type(error).__name__}: {error}"
