"""VAEs whose weights stay in their file, against ComfyUI's own of the same file."""

from __future__ import annotations

from pathlib import Path

import comfy.ldm.modules.diffusionmodules.model as model_code
import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from safetensors.torch import load_file, save_file
from vae_files import write_vae

from raylight.host.vae_file import map_vae, structure
from raylight.host.vae_jobs import VaeRecipe


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("computed", ["float32", "bfloat16"])
def test_is_the_vae_of_comfyui(stored: torch.dtype, computed: str, tmp_path: Path) -> None:
    path = write_vae(tmp_path / "vae.safetensors", "wan-narrow", stored)
    tensors, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    stock = comfy.sd.VAE(sd=tensors, metadata=metadata, dtype=getattr(torch, computed))
    mapped = map_vae(VaeRecipe.of_file(str(path), computed))
    assert mapped.vae.vae_dtype == stock.vae_dtype and not mapped.missing
    assert structure(mapped.vae.first_stage_model) == structure(stock.first_stage_model)
    ours, theirs = (dict(vae.first_stage_model.named_parameters()) for vae in (mapped.vae, stock))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert ours[name].dtype == stored, "it is the tensor of the file"
        assert mapped.dtypes[name] == weight.dtype
        assert torch.equal(ours[name].to(weight.dtype), weight)


def test_attention_is_not_that_of_xformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are not followed through xformers, which ComfyUI would take where it is installed."""
    monkeypatch.setattr(comfy.model_management, "xformers_enabled_vae", lambda: True)
    path = write_vae(tmp_path / "vae.safetensors", "wan-narrow")
    model = map_vae(VaeRecipe.of_file(str(path), "float32")).vae.first_stage_model
    chosen = [one.optimized_attention for one in model.modules() if hasattr(one, "optimized_attention")]
    assert chosen and model_code.xformers_attention not in chosen


def test_weights_of_an_encoder_may_be_missing(tmp_path: Path) -> None:
    tensors = load_file(write_vae(tmp_path / "vae.safetensors", "wan-narrow"))
    of_encoder = {name for name in tensors if name.startswith(("encoder.", "conv1."))}
    path = tmp_path / "decoder.safetensors"
    # ComfyUI reads the number of image channels from one of them.
    kept = of_encoder - {"encoder.conv1.weight"}
    save_file({name: one for name, one in tensors.items() if name not in kept}, path)
    assert map_vae(VaeRecipe.of_file(str(path), "float32")).missing == kept


@pytest.mark.parametrize("name", ["decoder.head.0.gamma", "conv2.bias", "decoder.middle.1.proj.weight"])
def test_rejects_a_file_without_a_tensor_for_decoding(name: str, tmp_path: Path) -> None:
    tensors = load_file(write_vae(tmp_path / "vae.safetensors", "wan-narrow"))
    del tensors[name]
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"less.safetensors cannot be loaded as a VAE: .*" + name.replace(".", r"\.")):
        map_vae(VaeRecipe.of_file(str(tmp_path / "less.safetensors"), "float32"))


def test_rejects_a_file_that_is_gone(tmp_path: Path) -> None:
    path = write_vae(tmp_path / "vae.safetensors", "wan-narrow")
    recipe = VaeRecipe.of_file(str(path), "float32")
    path.unlink()
    with pytest.raises(ValueError, match="is not there on the machine"):
        map_vae(recipe)
