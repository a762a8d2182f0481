"""Quantised tensors, and layers that unpack them when they are used."""

import comfy.lora
import comfy.ops
import torch

from .dequant import dequantize_tensor, is_quantized


class GGMLTensor(torch.Tensor):
    """Stored blocks with the shape of what they stand for. `patches` are pairs of ComfyUI's patches and a name."""

    def __new__(cls, *args, tensor_type, tensor_shape, patches=(), **kwargs):
        return super().__new__(cls, *args, **kwargs)

    def __init__(self, *args, tensor_type, tensor_shape, patches=(), **kwargs):
        super().__init__()
        self.tensor_type, self.tensor_shape, self.patches = tensor_type, tensor_shape, list(patches)

    @property
    def shape(self):
        return getattr(self, "tensor_shape", None) or self.size()

    def to(self, *args, **kwargs):
        moved = super().to(*args, **kwargs)
        for name in ("tensor_type", "tensor_shape", "patches"):
            if hasattr(self, name):
                setattr(moved, name, getattr(self, name))
        return moved

    def detach(self):
        return self

    def clone(self, *args, **kwargs):
        return self


class GGMLLayer(torch.nn.Module):
    comfy_cast_weights = True

    def is_ggml_quantized(self):
        return is_quantized(self.weight) or is_quantized(getattr(self, "bias", None))

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        loaded = {key: state_dict.get(prefix + key) for key in ("weight", "bias")}
        if not isinstance(self, torch.nn.Linear) and not any(is_quantized(value) for value in loaded.values()):
            return super()._load_from_state_dict(state_dict, prefix, *rest)
        for key, value in loaded.items():
            if value is not None:
                setattr(self, key, torch.nn.Parameter(value, requires_grad=False))
        rest[3].extend(key for key in state_dict if key.removeprefix(prefix) not in loaded)  # unexpected keys
        return None

    def get_weight(self, tensor, dtype):
        if tensor is None:
            return None
        value = dequantize_tensor(tensor, dtype)
        for patches, key in getattr(tensor, "patches", ()):
            value = comfy.lora.calculate_weight(patches, value, key)
        return value

    def unpacked(self, like):
        bias = getattr(self, "bias", None)
        return tuple(
            self.get_weight(None if one is None else one.to(like.device), like.dtype) for one in (self.weight, bias)
        )

    def forward_comfy_cast_weights(self, value, *args, **kwargs):
        if self.is_ggml_quantized():
            return self.forward_ggml_cast_weights(value)
        return super().forward_comfy_cast_weights(value, *args, **kwargs)


class GGMLOps(comfy.ops.manual_cast):
    class Linear(GGMLLayer, comfy.ops.manual_cast.Linear):
        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features, self.weight, self.bias = in_features, out_features, None, None

        def forward_ggml_cast_weights(self, value):
            return torch.nn.functional.linear(value, *self.unpacked(value))

    class Conv2d(GGMLLayer, comfy.ops.manual_cast.Conv2d):
        def forward_ggml_cast_weights(self, value):
            return self._conv_forward(value, *self.unpacked(value))
