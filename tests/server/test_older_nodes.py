"""Deprecated nodes and older forms in prompts of scripts, on a real server, against ComfyUI's own nodes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared_server import MODEL, SharedServer

from raylight.dev.demo import comfy_server
from raylight.dev.demo.graphs import Graph, Sampling, node, on_workers, stock

JOB = Sampling(MODEL, width=112, height=80, frames=5, steps=3)
VAE = "older-vae.safetensors"
# As a script has them that was written for the 10-value initializer: some are missing, one stands at a switch.
OLDER = {"GPU": 2, "ulysses_degree": 2, "ring_degree": 1, "cfg_degree": True, "dp_degree": False, "FSDP": "TORCH_FLASH"}


@pytest.fixture(scope="module")
def server(shared_server: SharedServer) -> SharedServer:
    demo = Path(comfy_server.__file__).parent / "model"
    shutil.copy(demo / "raylight-demo-vae.safetensors", shared_server.models / VAE)
    return shared_server


def with_workers(graph: Graph) -> Graph:
    return graph | {"workers": node("RayInitializer", **OLDER)}


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert ((actual - expected).abs().max() / expected.std()).item() <= 1e-4


@pytest.mark.parametrize("dual", [False, True])
def test_guiders_schedulers_and_sampling_patches(dual: bool, server: SharedServer) -> None:
    kind, guidance = "CFGGuider", {"positive": ["positive", 1], "negative": ["negative", 1], "cfg": 3.0}
    if dual:
        kind = "DualCFGGuider"
        guidance = {"cond1": ["positive", 1], "cond2": ["negative", 1], "negative": ["negative", 1]}
        guidance |= {"cfg_conds": 3.0, "cfg_cond2_negative": 2.0, "style": "regular"}
    sampling = {"sampler": ["sampler", 0], "sigmas": ["sigmas", 0], "latent_image": ["latent", 0]}
    shared = {"sampler": node("KSamplerSelect", sampler_name="euler")}
    sigmas = {"steps": 3, "alpha": 0.4, "beta": 0.4}

    expected = stock(JOB) | shared
    expected |= {
        "patched": node("ModelSamplingSD3", model=["model", 0], shift=8.0),
        "sigmas": node("BetaSamplingScheduler", model=["patched", 0], **sigmas),
        "guider": node(kind, model=["patched", 0], **guidance),
        "noise": node("RandomNoise", noise_seed=42),
        "sample": node("SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], **sampling),
    }
    ours = with_workers(on_workers(JOB, 2)) | shared
    ours |= {
        "patched": node("RayModelSamplingSD3", ray_actors=["model", 0], shift=8.0),
        "sigmas": node("RayBetaSamplingScheduler", ray_actors=["patched", 0], **sigmas),
        "guider": node(f"Ray{kind}", ray_actors=["patched", 0], **guidance),
        "sample": node("XFuserSamplerCustomAdvanced", add_noise=True, noise_seed=42, guider=["guider", 0], **sampling),
    }
    for graph in (expected, ours):
        graph["save"]["inputs"]["samples"] = ["sample", 1]  # what the last step showed
    assert_same(server.latent(ours), server.latent(expected))
    assert "XFuser_attention" not in OLDER and "TORCH_FLASH stood at FSDP" in server.log.read_text("utf-8")


def test_a_basic_guider_flux_sampling_and_a_compiled_model(server: SharedServer) -> None:
    flux = {"max_shift": 1.15, "base_shift": 0.5, "width": 256, "height": 256}
    sampling = {"sampler": ["sampler", 0], "sigmas": ["sigmas", 0], "latent_image": ["latent", 0]}
    sigmas = {"scheduler": "simple", "steps": 3, "denoise": 1.0}
    shared = {"sampler": node("KSamplerSelect", sampler_name="euler"), "off": node("DisableNoise")}
    expected = stock(JOB) | shared
    expected |= {
        "patched": node("ModelSamplingFlux", model=["model", 0], **flux),
        "sigmas": node("BasicScheduler", model=["patched", 0], **sigmas),
        "guider": node("BasicGuider", model=["patched", 0], conditioning=["positive", 1]),
        "sample": node("SamplerCustomAdvanced", noise=["off", 0], guider=["guider", 0], **sampling),
    }
    ours = with_workers(on_workers(JOB, 2)) | shared
    ours |= {
        "compiled": node("RayTorchCompileModel", ray_actors=["model", 0], backend="cudagraphs"),
        "patched": node("RayModelSamplingFlux", ray_actors=["compiled", 0], **flux),
        "sigmas": node("RayBasicScheduler", ray_actors=["patched", 0], **sigmas),
        "guider": node("RayBasicGuider", ray_actors=["patched", 0], conditioning=["positive", 1]),
        "sample": node("XFuserSamplerCustomAdvanced", add_noise=False, noise_seed=1, guider=["guider", 0], **sampling),
        # The older form gives the model for the next sampler.
        "again": ours["sample"] | {"inputs": ours["sample"]["inputs"] | {"ray_actors": ["sample", 2]}},
        "save again": node("SaveLatent", samples=["again", 0], filename_prefix="again"),
    }
    history = server.run(ours, 180.0)
    assert_same(load_file(server.output_files(history, "save")[0])["latent_tensor"], server.latent(expected))
    patched = stock(JOB) | {"patched": node("ModelSamplingFlux", model=["model", 0], **flux)}
    patched["sample"]["inputs"]["model"] = ["patched", 0]
    assert_same(load_file(server.output_files(history, "save again")[0])["latent_tensor"], server.latent(patched))


def test_a_decoded_picture(server: SharedServer) -> None:
    noise = torch.randn(1, 16, 12, 14, generator=torch.Generator().manual_seed(1))
    latent = {"latent_tensor": noise, "latent_format_version_0": torch.tensor([])}
    save_file(latent, server.directory("input") / "older.latent")
    tiles = {"tile_size": 64, "overlap": 0, "temporal_size": 64, "temporal_overlap": 8}
    graph = {name: on_workers(JOB, 2)[name] for name in ("workers", "model")}
    graph |= {
        "latent": node("LoadLatent", latent="older.latent"),
        "ours": node("RayVAEDecodeDistributed", ray_actors=["model", 0], samples=["latent", 0], vae_name=VAE, **tiles),
        "picture": node("SaveImage", images=["ours", 0], filename_prefix="ours"),
        "vae": node("VAELoader", vae_name=VAE),
        "theirs": node("VAEDecode", vae=["vae", 0], samples=["latent", 0]),  # workers need no tiles
        "stock": node("SaveImage", images=["theirs", 0], filename_prefix="stock"),
    }
    history = server.run(graph, 180.0)
    (ours,), (expected,) = (server.output_files(history, name) for name in ("picture", "stock"))
    assert ours.read_bytes() == expected.read_bytes()
