"""Loading: a tiny model file through ComfyUI's own loader as the workers load it, a VAE, LoRAs, quantised weights."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.ops
import comfy.quant_ops
import torch
from comfy.taesd.taesd import TAESD
from safetensors.torch import save_file
from torch import nn

from raylight.dev.demo.tiny import write_checkpoint
from raylight.host.checkpoint import MappedModel, load_mapped
from raylight.host.vae_file import map_vae
from raylight.host.vae_jobs import VaeRecipe
from raylight.sharding.subclass_weights import flatten_tensor

from .seam import Seam

FILE = "raylight/host/checkpoint.py"
QUANTISED = "raylight/sharding/subclass_weights.py"
PATCHES = "raylight/worker/sharded_patches.py"
ROWS = 128
COLUMNS = 512  # a multiple of what every format has in a block


def seams() -> list[Seam]:
    """Return the seams of loading."""
    found = [
        Seam(
            "loading a diffusion model whose weights stay in their file",
            FILE,
            "no model can be loaded in the workers",
            _weights_stay,
        ),
        Seam(
            "comfy.lora.model_lora_keys_unet",
            "raylight/worker/lora.py",
            "LoRAs are not applied by the workers",
            _lora_keys,
        ),
        Seam(
            "loading a VAE whose weights stay in their file",
            "raylight/host/vae_file.py",
            "VAEs cannot be decoded or encoded by the workers",
            _vae_stays,
        ),
        Seam(
            "comfy_cast_weights of a layer",
            "raylight/driver/weightless.py",
            "nodes that ask for a model's dtype get that of the file",
            _casts,
        ),
        Seam(
            "convert_weight and set_weight of a quantised layer",
            PATCHES,
            "a LoRA on quantised weights fails with FSDP",
            _quantised_layer,
        ),
    ]
    for name in comfy.quant_ops.QUANT_ALGOS:
        stops = f"models in {name} cannot have their weights sharded (FSDP)"
        look = functools.partial(_is_rebuilt, name)
        found.append(Seam(f"the quantised format {name}", QUANTISED, stops, look))
    return found


@functools.cache
def mapped() -> MappedModel:
    """Return a tiny model as a worker maps it."""
    return _in_file(lambda path: write_checkpoint(path, "wan-t2v"), lambda path: load_mapped(path, {}))


def _in_file(write: Callable[[Path], Any], read: Callable[[str], Any]) -> Any:
    with tempfile.TemporaryDirectory(prefix="raylight-check-") as folder:
        path = Path(folder) / "tiny.safetensors"
        write(path)
        return read(str(path))


def _weights_stay() -> str | None:
    found = mapped()
    parameters = dict(found.model.diffusion_model.named_parameters())
    if any(parameter.is_meta for parameter in parameters.values()):
        return "leaves weights without a value"
    if set(parameters) != set(found.dtypes):
        return "does not build a model with the patcher that it is given"
    return None


def _lora_keys() -> str | None:
    keys = set(mapped().lora_keys.values())
    return None if any(str(key).endswith("weight") for key in keys) else "names no weights of a model"


def _vae_stays() -> str | None:
    found = _in_file(
        lambda path: save_file(TAESD().state_dict(), path), lambda path: map_vae(VaeRecipe.of_file(path, "float32"))
    )
    meta = [name for name, value in found.vae.first_stage_model.named_parameters() if value.is_meta]
    return f"leaves weights without a value ({meta[0]})" if meta else None


def _casts() -> str | None:
    layer = comfy.ops.disable_weight_init.Linear(2, 2)
    return None if hasattr(layer, "comfy_cast_weights") else "is gone"


def _quantised_layer() -> str | None:
    layer: Any = comfy.ops.mixed_precision_ops({}).Linear
    lacking = [name for name in ("convert_weight", "set_weight") if not callable(getattr(layer, name, None))]
    return f"{' and '.join(lacking)} is gone" if lacking else None


def _is_rebuilt(name: str) -> str | None:
    """Flatten a quantised matrix into stored rows and rebuild it, as sharding does."""
    layout = comfy.quant_ops.QUANT_ALGOS[name]["comfy_tensor_layout"]
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    stored = comfy.quant_ops.QuantizedTensor.from_float(weight, layout, scale="recalculate")
    flat = flatten_tensor(nn.Parameter(stored, requires_grad=False))
    if flat is None:
        return "is no tensor that PyTorch can take apart"
    rebuilt: Any = flat.rebuild(flat.components)
    if not torch.equal(rebuilt.dequantize(), stored.dequantize()):
        return "is another weight after it was taken apart and rebuilt"
    return None
