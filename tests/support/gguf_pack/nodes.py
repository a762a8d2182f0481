"""The patcher that its loader node returns."""

import comfy.model_patcher
import comfy.utils

from .dequant import is_quantized


class GGUFModelPatcher(comfy.model_patcher.ModelPatcher):
    def clone(self, *args, **kwargs):
        made = comfy.model_patcher.ModelPatcher.clone(self, *args, **kwargs)
        made.__class__ = GGUFModelPatcher
        return made

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False):
        if key not in self.patches:
            return None
        weight = comfy.utils.get_attr(self.model, key)
        if not is_quantized(weight):
            return super().patch_weight_to_device(key, device_to, inplace_update)
        weight = weight.to(device_to)
        weight.patches = [(self.patches[key], key)]
        comfy.utils.set_attr_param(self.model, key, weight)
        return None


class UnetLoaderGGUF:
    pass
