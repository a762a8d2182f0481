"""Read tensors from files, memory-mapped, as ComfyUI reads them in its own process.

With DynamicVRAM ComfyUI has its own reader for .safetensors, which takes each tensor from where the header says that it
is. Otherwise, and in workers, it uses the safetensors package, which refuses files with bytes that belong to no tensor.
Here a file may be read by either.
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
_LENGTH_BYTES = 8  # of the header's length, little-endian, at the start of the file
# By their names in a header. Older versions of PyTorch lack some.
DTYPES = {
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


def tolerant_reader(read: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ComfyUI's `load_torch_file`: where the safetensors package refuses a file, read it by its header alone.

    The wrapper raises what `read` raises where that fails too.
    """

    def read_either(path: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return read(path, *args, **kwargs)
        except Exception as error:  # of safetensors, pickle, zip, the system: whatever the file is instead
            if not path.lower().endswith(_ENDINGS):
                raise
            try:
                tensors, metadata = by_header(path)
            except (ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError, OverflowError):
                raise error from None
        return (tensors, metadata) if kwargs.get("return_metadata") else tensors

    return read_either


def read(path: str) -> dict[str, Tensor]:
    """Return the tensors of a file by name, memory-mapped where the format allows it. Raises as `tolerant_reader`."""
    return tolerant_reader(comfy.utils.load_torch_file)(path, safe_load=True)


def by_header(path: str) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Return each tensor from where the header says, whatever else is in the file, and the header's metadata.

    Raises ValueError, KeyError or TypeError: for an impossible header.
    """
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
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        if not 0 <= start <= end <= size - begin or end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"the tensor {name} is not where the header says")
        # A storage for each, as by safetensors: then a tensor may begin at any byte.
        storage = mapped[begin + start : begin + end]
        tensors[name] = torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # pyright: ignore[reportCallIssue]
        if getattr(comfy.utils, "DISABLE_MMAP", False):
            tensors[name] = tensors[name].clone()
    return tensors, metadata


def describe_error(error: Exception) -> str:
    """Return an error of a reader as a sentence: many name no more than a key or an index."""
    if isinstance(error, KeyError):
        key = error.args[0]
        if isinstance(key, str) and "." in key:
            return f"the tensor {key} is missing"
        return f"ComfyUI looks for {key!r} in it, and that is not there or not known"
    if isinstance(error, EOFError):
        return "it ends too early"
    explains = isinstance(error, (ValueError, RuntimeError, OSError, SafetensorError)) and str(error)
    return str(error) if explains else f"{type(error).__name__}: {error}"
