"""A node pack of somebody else, as far as Raylight goes: a loader, a sampler, patches of a transformer's inside, and a
weight that is set in place.
"""

import threading

import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.ldm.modules.attention import wrap_attn

from .strength import Strength


class ForeignSampler:
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "make"
    CATEGORY = "foreign"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        return (comfy.samplers.KSAMPLER(sample_halfway),)


def sample_halfway(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Two looks at the model for each step, the second halfway."""
    ones = x.new_ones([x.shape[0]])
    for step in range(len(sigmas) - 1):
        first = model(x, sigmas[step] * ones, **extra_args)
        middle = (sigmas[step] + sigmas[step + 1]) / 2
        x = x + (x - first) / sigmas[step] * (middle - sigmas[step])
        second = model(x, middle * ones, **extra_args)
        x = x + (x - second) / middle * (sigmas[step + 1] - middle)
        if callback is not None:
            callback({"x": x, "i": step, "sigma": sigmas[step], "sigma_hat": sigmas[step], "denoised": second})
    return x


class ForeignPatch:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "foreign"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "secret": ("BOOLEAN", {"default": False})}}

    def patch(self, model, secret):
        strength, held = Strength(0.5), threading.Lock() if secret else None

        def around(args, extra):
            out = extra["original_block"](args)
            assert held is None or held
            return {"img": args["img"] + strength.of(out["img"] - args["img"])}

        model = model.clone()
        model.set_model_patch_replace(around, "dit", "double_block", 0)
        return (model,)


class ForeignLoader:
    """Does not say what it has read."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = "foreign"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"unet_name": (folder_paths.get_filename_list("diffusion_models"),)}}

    def load(self, unet_name):
        tensors = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("diffusion_models", unet_name))
        return (comfy.sd.load_diffusion_model_state_dict(tensors),)


class ForeignWeight:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "change"
    CATEGORY = "foreign"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def change(self, model):
        model.model.diffusion_model.head.head.weight.mul_(1.5)
        return (model.clone(),)


def sageattn(q, k, v, tensor_layout="HND", sm_scale=None):
    """Stands for a library of kernels; its result shows that it was called."""
    return torch.nn.functional.scaled_dot_product_attention(q, k * 1.05, v, scale=sm_scale)


class ForeignAttention:
    """Puts a kernel of a library into a model, as packs do: behind decorators of PyTorch's and ComfyUI's."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "change"
    CATEGORY = "foreign"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def change(self, model):
        kernel = torch.compiler.disable()(lambda q, k, v, scale: sageattn(q, k, v, sm_scale=scale))

        @wrap_attn
        def attention(q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
            if not skip_reshape:
                q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
            out = kernel(q, k, v, kwargs.get("scale"))
            return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

        def override(function, *args, **kwargs):
            return attention.__wrapped__(*args, **kwargs)

        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = override
        return (model,)


NODE_CLASS_MAPPINGS = {
    "ForeignSampler": ForeignSampler,
    "ForeignPatch": ForeignPatch,
    "ForeignLoader": ForeignLoader,
    "ForeignWeight": ForeignWeight,
    "ForeignAttention": ForeignAttention,
}
NODE_DISPLAY_NAME_MAPPINGS = {"ForeignPatch": "Foreign Patch"}
