"""What is quantised, and how it is unpacked."""

import gguf
import torch

PLAIN = (None, gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)


def is_quantized(tensor):
    return tensor is not None and getattr(tensor, "tensor_type", None) not in PLAIN


def dequantize_tensor(tensor, dtype=None, dequant_dtype=None):
    if not is_quantized(tensor):
        return tensor.to(dtype)
    with torch._C.DisableTorchFunctionSubclass():
        stored = tensor.as_subclass(torch.Tensor).cpu().numpy()
    values = gguf.quants.dequantize(stored, tensor.tensor_type)
    return torch.from_numpy(values).reshape(tensor.tensor_shape).to(tensor.device, dtype=dtype)
