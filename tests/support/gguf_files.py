"""GGUF files of real architectures at tiny widths, and the pack that reads them."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
from safetensors.torch import load_file
from torch import Tensor

# The tests hold for ComfyUI-GGUF itself as well: GGUF_PACK names its folder.
PACK = os.environ.get("GGUF_PACK") or str(Path(__file__).with_name("gguf_pack"))

Kind = gguf.GGMLQuantizationType


def write_gguf(
    source: Path,
    target: Path,
    kind: str,
    architecture: str,
    without: str = "",
    more: dict[str, Tensor] | None = None,
    rest: str = "F16",
) -> None:
    """Write the tensors of a safetensors file, with the matrices of blocks quantised.

    As converters do, it leaves small tensors in float32, stores matrices outside of blocks in another form, `rest`, and
    flattens what has more dims than the format knows. One tensor may be left out, others added.
    """
    writer = gguf.GGUFWriter(target, architecture)
    for name, tensor in (load_file(source) | (more or {})).items():
        if name == without:
            continue
        data = tensor.float().numpy()
        if data.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(data.shape))
            data = data.reshape(data.shape[0], -1)
        form = Kind[_form(name, data.shape, tensor.ndim, kind, rest)]
        writer.add_tensor(name, gguf.quants.quantize(data, form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _form(name: str, stored: tuple[int, ...], dims: int, kind: str, rest: str) -> str:
    if dims == 2 and "blocks." in name and stored[-1] % 32 == 0:
        return kind
    return rest if dims == 2 or dims > 4 else "F32"


def quantised_bytes(path: Path) -> int:
    """The bytes of a file's tensors."""
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)


def gathered_bytes(path: Path, world: int) -> int:
    """Return the bytes that `world` ranks have after they have gathered the matrices of a file as it stores them: each
    rank gives as many rows as the first one has.
    """
    matrices = [one.data for one in gguf.GGUFReader(path).tensors if len(one.shape) >= 2 and one.data.shape[0] >= world]
    return sum(world * -(-rows.shape[0] // world) * rows[:1].nbytes for rows in matrices)
