"""Reading files."""

import warnings

import gguf
import torch

from .ops import GGMLTensor

ARCHITECTURES = ("flux", "wan", "sd3")


def gguf_sd_loader(path):
    reader = gguf.GGUFReader(path)
    architecture = reader.get_field("general.architecture").contents()
    if architecture not in ARCHITECTURES:
        raise ValueError(f"Unexpected architecture {architecture}")
    tensors = {}
    for tensor in reader.tensors:
        original = reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}")
        sizes = original.contents() if original is not None else reversed(tensor.shape.tolist())
        shape = torch.Size(int(size) for size in sizes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an array that cannot be written to
            stored = torch.from_numpy(tensor.data)
        if tensor.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            stored = stored.view(shape)
        tensors[tensor.name] = GGMLTensor(stored, tensor_type=tensor.tensor_type, tensor_shape=shape)
    return tensors, {"metadata": {"general.architecture": architecture}}
