"""A text encoder of 10 GB, a VAE and a worker on one GPU that has no room for all of them."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.model_management import minimum_inference_memory
from gpu_cases import SHAPE, latent, on_workers
from other_service import free_workers
from shared_gpu_cases import Encoder, held, kept, left_free, vae, wide_wan

from raylight.driver import memory
from raylight.host.recipe import REPLICATED, SHARDED

MIB = 1 << 20
# More than what is asked for leaves: whole layers, and ComfyUI keeps buffers for those that come back on use. And a
# little less, where PyTorch has some left.
LESS, MORE = 64 * MIB, 384 * MIB


@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
def test_each_takes_from_the_others_what_is_missing(sharding: str, folder: Path, compare) -> None:
    path = wide_wan(folder)
    expected = latent(comfy.sd.load_diffusion_model(str(path)))
    encoder, decoder = Encoder(comfy.model_management.get_torch_device()), vae()
    latents = torch.randn(1, 4, 96, 96, generator=torch.Generator().manual_seed(1))
    text, image = encoder.encode(), decoder.decode(latents)
    comfy.model_management.unload_all_models()
    free_workers()

    model = on_workers(path, sharding)
    compare(latent(model), expected, "alone")
    latent(model)  # weights that stay gathered are there from now on
    full = held()
    (rank,) = [entry.rank for entry in memory._workers.entries if entry.device == encoder.patcher.load_device]
    # Gathered weights go first, and then half of the others.
    missing = kept()[rank] + full[rank] // 2
    with left_free(encoder.room - missing):
        for _ in range(2):  # the second time, nothing is missing
            assert torch.equal(encoder.encode(), text)
            assert encoder.patcher.loaded_size() == encoder.patcher.model_size()
            after = held()
            assert not any(kept().values())
            if sharding == REPLICATED:
                given = full[rank] - after[rank]
                assert missing - LESS <= given <= missing + MORE, f"{given / 1e6:.0f} of {missing / 1e6:.0f} MB"
                assert {**after, rank: 0} == {**full, rank: 0}, "memory of other GPUs does not help"
            else:
                assert not any(after.values())

        lacking = full[rank] - after[rank] + int(model.model.memory_required(list(SHAPE)))
        with left_free(int(minimum_inference_memory())):
            for turn in ("beside the encoder", "again"):
                compare(latent(model), expected, turn)
                gone = encoder.patcher.model_size() - encoder.patcher.loaded_size()
                assert held() == full
                assert lacking - LESS <= gone <= lacking + MORE, f"{gone / 1e6:.0f} of {lacking / 1e6:.0f} MB"

            compare(decoder.decode(latents), image, "decoded")
            assert held() == full, "the encoder was used before the workers"
            for turn in ("first", "second"):
                assert torch.equal(encoder.encode(), text)
                compare(latent(model), expected, f"after the {turn} encoding")
                compare(decoder.decode(latents), image, f"decoded {turn}")
