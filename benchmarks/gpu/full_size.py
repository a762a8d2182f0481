"""Models at full size with random weights, generated on the GPU by name.

Nothing is downloaded, the weights are the same in every process, and a rank can generate the rows of its shard.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "support"), os.environ["COMFYUI_PATH"]]
sys.path.append(str(ROOT))

from comfy.cli_args import args as comfy_args

comfy_args.cpu = not torch.cuda.is_available()  # before ComfyUI's modules choose a device


@dataclass(frozen=True)
class FullSize:
    """A family of `raylight.dev.zoo` with the widths of the real model, the shape of its latent and of its texts, and
    other arguments.
    """

    title: str
    family: str
    widths: Mapping[str, Any]
    latent: tuple[int, ...]
    texts: Mapping[str, tuple[int, ...]]
    more: Mapping[str, Any] = field(default_factory=dict)


WAN = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, "text_dim": 4096, "freq_dim": 256}
FLUX = {
    "hidden_size": 3072,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "mlp_ratio": 4.0,
    "context_in_dim": 4096,
    "vec_in_dim": 768,
}
_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # in the header of a file
LAYERS = ("num_layers", "n_layers", "depth", "depth_single_blocks")
SIZES = {
    "wan-480p": FullSize(
        "Wan 2.1 14B, 832x480, 33 frames", "Wan T2V", WAN, (1, 16, 9, 60, 104), {"c_crossattn": (1, 512, 4096)}
    ),
    "wan-720p": FullSize(
        "Wan 2.1 14B, 1280x720, 81 frames", "Wan T2V", WAN, (1, 16, 21, 90, 160), {"c_crossattn": (1, 512, 4096)}
    ),
    "flux-1024": FullSize(
        "Flux dev, 1024x1024",
        "Flux Dev",
        FLUX,
        (1, 16, 128, 128),
        {"c_crossattn": (1, 512, 4096), "y": (1, 768), "guidance": (1,)},
    ),
    "wan-1.3b": FullSize(
        "Wan 2.1 1.3B, 832x480, 81 frames",
        "Wan T2V",
        WAN | {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30},
        (1, 16, 21, 60, 104),
        {"c_crossattn": (1, 512, 4096)},
    ),
    "wan-5b": FullSize(
        "Wan 2.2 5B, 1280x704, 121 frames",
        "Wan 2.2 5B",
        WAN | {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30},
        (1, 48, 31, 44, 80),
        {"c_crossattn": (1, 512, 4096)},
    ),
    "qwen-1024": FullSize(
        "Qwen Image, 1024x1024",
        "Qwen Image",
        {
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
            "axes_dims_rope": (16, 56, 56),
        },
        (1, 16, 1, 128, 128),
        {"c_crossattn": (1, 256, 3584)},
    ),
    "z-image-1024": FullSize(
        "Z-Image, 1024x1024",
        "Z-Image",
        {
            "dim": 3840,
            "n_layers": 30,
            "n_heads": 30,
            "n_kv_heads": 30,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "cap_feat_dim": 2560,
            "ffn_dim_multiplier": 8.0 / 3.0,
        },
        (1, 16, 128, 128),
        {"c_crossattn": (1, 256, 2560)},
        {"num_tokens": 256},
    ),
    "ltx-13b": FullSize(
        "LTX-Video 13B, 1216x704, 121 frames",
        "LTX-Video",
        {
            "num_layers": 48,
            "attention_head_dim": 128,
            "num_attention_heads": 32,
            "in_channels": 128,
            "cross_attention_dim": 4096,
            "caption_channels": 4096,
        },
        (1, 128, 16, 22, 38),
        {"c_crossattn": (1, 256, 4096)},
        {"frame_rate": 25, "attention_mask": None},
    ),
    "tiny-wan": FullSize(
        "a tiny Wan, to try a benchmark on a CPU",
        "Wan T2V",
        {"dim": 1024, "ffn_dim": 1024, "num_heads": 8, "num_layers": 2, "text_dim": 4096, "freq_dim": 256},
        (1, 16, 3, 14, 18),
        {"c_crossattn": (1, 11, 4096)},
    ),
}


def skeleton(name: str, layers: int | None = None, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return ComfyUI's model of that size on `meta`; with `layers`, this many of each kind instead of all."""
    import comfy.supported_models

    from raylight.dev.zoo import families

    size = SIZES[name]
    family = families()[size.family]
    widths = dict(size.widths)
    if layers is not None:
        widths.update({key: layers for key in LAYERS if key in widths})
    config = getattr(comfy.supported_models, family.config)({**family.unet_config, **widths})
    config.set_inference_dtype(dtype, None)
    return config.get_model({}, "", device=torch.device("meta")).eval().requires_grad_(False)


def build(name: str, device: torch.device, layers: int | None = None, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return the model of `skeleton` with its weights, on a device."""
    model = skeleton(name, layers, dtype)
    weights = RandomWeights(model.diffusion_model, device)
    fill(model.diffusion_model, weights, device)
    model.device = device
    return model


def fill(diffusion_model: nn.Module, weights: Mapping[str, Tensor], device: torch.device) -> None:
    """Replace the parameters by `weights`, and move buffers to the device."""
    for name in list(dict(diffusion_model.named_parameters())):
        owner, _, leaf = name.rpartition(".")
        setattr(diffusion_model.get_submodule(owner), leaf, nn.Parameter(weights[name], requires_grad=False))
    for name, buffer in list(diffusion_model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(diffusion_model.get_submodule(owner), leaf, buffer.to(device))


class RandomWeights(Mapping):
    """Weights of a model by name, generated on access: matrices scaled by their fan-in, as in the zoo."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.like = {name: (tuple(parameter.shape), parameter.dtype) for name, parameter in model.named_parameters()}
        self._device = device

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype = self.like[name]
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(shape, generator=generator, device=self._device)
        if len(shape) >= 2:
            return noise.mul_(max(1, noise[0].numel()) ** -0.5).to(dtype)
        noise.mul_(0.1)
        return (noise + 1 if "norm" in name and name.endswith(("weight", "scale")) else noise).to(dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)


def inputs(name: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Return the arguments of `BaseModel.apply_model`."""
    size, generator = SIZES[name], torch.Generator(device).manual_seed(0)
    made = {
        key: torch.randn(shape, generator=generator, device=device, dtype=dtype)
        for key, shape in {"x": size.latent, **size.texts}.items()
    }
    return made | {"t": torch.tensor([0.7], device=device)} | dict(size.more)


def write_checkpoint(name: str, path: Path, device: torch.device, layers: int | None = None) -> int:
    """Write a .safetensors file of that model for ComfyUI's loader, tensor by tensor, and return its bytes."""
    weights = RandomWeights(skeleton(name, layers).diffusion_model, device)
    header, offset = {}, 0
    for key, (shape, dtype) in weights.like.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in weights:
            file.write(weights[key].cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return path.stat().st_size


def versions() -> dict[str, str]:
    """Return the hardware and software, for the file of results."""
    from comfyui_version import __version__ as comfyui

    found = {"torch": torch.__version__, "ComfyUI": comfyui}
    if torch.cuda.is_available():
        found |= {
            "GPU": torch.cuda.get_device_name(),
            "CUDA": torch.version.cuda or "",
            "cuDNN": str(torch.backends.cudnn.version()),
        }
    return found
