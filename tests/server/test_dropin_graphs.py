"""Graphs of ComfyUI's own nodes, and of another pack's, on a real server: only the loader is replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from server_graphs import WORKERS, chain, on_ray
from shared_server import SharedServer

from raylight.dev.demo.comfy_replies import PromptFailed
from raylight.dev.demo.comfy_server import ComfyServer
from raylight.dev.demo.graphs import Graph, Sampling, node, stock

JOB = Sampling("wan.safetensors", width=112, height=80, frames=9, steps=3)


@pytest.fixture(scope="module")
def server(shared_server: SharedServer) -> ComfyServer:
    shared_server.add_lora("lora.safetensors", ["lora", "loha", "dora"], 1)
    return shared_server


def plain(**sampler: Any) -> Graph:
    graph = stock(JOB)
    graph["sample"]["inputs"] |= sampler
    return graph


def behind_the_model(**nodes: dict[str, Any]) -> Graph:
    return chain(plain(), nodes)


def custom(sampler: dict[str, Any]) -> Graph:
    graph = plain()
    graph |= {
        "sampler": sampler,
        "noise": node("RandomNoise", noise_seed=5),
        "sigmas": node("BasicScheduler", model=["model", 0], scheduler="simple", steps=3, denoise=1.0),
        "guider": node("CFGGuider", model=["model", 0], positive=["positive", 1], negative=["negative", 1], cfg=3.0),
        "sample": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["sampler", 0],
            sigmas=["sigmas", 0],
            latent_image=["latent", 0],
        ),
    }
    graph["save"]["inputs"]["samples"] = ["sample", 1]  # what the last step showed
    return graph


def in_two_parts() -> Graph:
    graph = plain(end_at_step=2, return_with_leftover_noise="enable")
    second = copy.deepcopy(graph["sample"])
    second["inputs"] |= {
        "add_noise": "disable",
        "start_at_step": 2,
        "end_at_step": 10000,
        "return_with_leftover_noise": "disable",
        "latent_image": ["sample", 0],
    }
    graph |= {"second": second}
    graph["save"]["inputs"]["samples"] = ["second", 0]
    return graph


def inpainted() -> Graph:
    graph = behind_the_model(different=node("DifferentialDiffusion", strength=0.8))
    graph |= {
        "mask": node("SolidMask", value=0.6, width=112, height=80),
        "masked": node("SetLatentNoiseMask", samples=["latent", 0], mask=["mask", 0]),
    }
    graph["sample"]["inputs"]["latent_image"] = ["masked", 0]
    return graph


GRAPHS: dict[str, Callable[[], Graph]] = {
    "KSampler Advanced in two parts": in_two_parts,
    "shift, CFGZeroStar, RescaleCFG": lambda: behind_the_model(
        shift=node("ModelSamplingSD3", shift=5.0), zero=node("CFGZeroStar"), rescale=node("RescaleCFG", multiplier=0.6)
    ),
    "SkipLayerGuidanceDiT": lambda: behind_the_model(
        skip=node(
            "SkipLayerGuidanceDiT",
            double_layers="1",
            single_layers="",
            scale=2.0,
            start_percent=0.0,
            end_percent=1.0,
            rescaling_scale=0.0,
        )
    ),
    "EasyCache": lambda: behind_the_model(
        cache=node("EasyCache", reuse_threshold=3.0, start_percent=0.0, end_percent=1.0, verbose=False)
    ),
    "context windows": lambda: behind_the_model(
        windows=node(
            "WanContextWindowsManual",
            context_length=5,
            context_overlap=1,
            context_schedule="standard_static",
            context_stride=1,
            closed_loop=False,
            fuse_method="pyramid",
            freenoise=False,
            split_conds_to_windows=False,
            retain_first_frame=False,
        )
    ),
    "LoraLoaderModelOnly twice": lambda: behind_the_model(
        first=node("LoraLoaderModelOnly", lora_name="lora.safetensors", strength_model=0.7),
        second=node("LoraLoaderModelOnly", lora_name="lora.safetensors", strength_model=-0.3),
    ),
    "inpainting": inpainted,
    "SamplerCustomAdvanced": lambda: custom(node("KSamplerSelect", sampler_name="res_multistep")),
    "another pack's sampler": lambda: custom(node("ForeignSampler")),
    "another pack's patch": lambda: behind_the_model(patch=node("ForeignPatch", secret=False)),
}


def latent(server: ComfyServer, graph: Graph) -> torch.Tensor:
    return load_file(server.output_files(server.run(graph, timeout=120), "save")[0])["latent_tensor"]


@pytest.mark.parametrize("name", GRAPHS)
def test_equals_the_untouched_graph(server: ComfyServer, name: str) -> None:
    graph = GRAPHS[name]()
    expected = latent(server, graph)
    for parallelize in (False, True):
        actual = latent(server, on_ray(graph, parallelize))
        assert ((actual - expected).abs().max() / expected.std()).item() <= 1e-4


def test_parallelize_behind_a_loader_and_a_weight_of_another_pack(server: ComfyServer) -> None:
    def at_the_end(graph: Graph) -> Graph:
        last = graph["sample"]["inputs"]["model"]
        graph = copy.deepcopy(graph) | {"workers": WORKERS}
        graph["sample"]["inputs"]["model"] = ["parallel", 0]
        return graph | {"parallel": node("RayParallelizeModel", model=last, ray_actors_init=["workers", 0])}

    def exports() -> int:
        return server.log.read_text("utf-8", errors="replace").count("from ComfyUI's memory")

    graph, before = plain(), exports()
    graph["model"] = node("ForeignLoader", unet_name="wan.safetensors")
    unchanged = latent(server, graph)
    graph |= {
        "weight": node("ForeignWeight", model=["model", 0]),
        "lora": node("LoraLoaderModelOnly", lora_name="lora.safetensors", strength_model=0.7, model=["weight", 0]),
    }
    for last, count in (("model", 1), ("weight", 2), ("lora", 2)):
        graph["sample"]["inputs"]["model"] = [last, 0]
        # First on workers: ComfyUI runs a node that changes a weight once, and keeps the model.
        actual = latent(server, at_the_end(graph))
        expected = latent(server, graph)
        assert ((actual - expected).abs().max() / expected.std()).item() <= 1e-4, last
        assert exports() - before == count, last
        if last != "model":
            assert ((expected - unchanged).abs().max() / expected.std()).item() > 1e-2, last


@pytest.mark.parametrize("kind", ["DPKSamplerAdvanced", "UnifiedParallelSampler"])
def test_several_images_at_once(server: ComfyServer, kind: str) -> None:
    graph = plain() | {
        "workers": node("RayInitializer", **(WORKERS["inputs"] | {"ulysses_degree": 1, "dp_degree": 0})),
        "first": node("RandomNoise", noise_seed=7),
        "second": node("RandomNoise", noise_seed=8),
        "noises": node("DPNoiseList", noise_1=["first", 0], noise_2=["second", 0]),
        "prompts": node("DPConditioningList", conditioning_1=["positive", 1], conditioning_2=["negative", 1]),
    }
    inputs = {name: value for name, value in graph["sample"]["inputs"].items() if name not in ("model", "noise_seed")}
    graph["model"] = node("RayUNETLoader", **graph["model"]["inputs"], ray_actors_init=["workers", 0])
    graph["sample"] = node(
        kind,
        **inputs
        | {"ray_actors": ["model", 0], "noise_list": ["noises", 0], "positive": ["prompts", 0], "denoise": 1.0},
    )
    files = server.output_files(server.run(graph, timeout=120), "save")
    for file, seed, prompt in zip(sorted(files), (7, 8), ("positive", "negative"), strict=True):
        expected = latent(server, plain(noise_seed=seed, positive=[prompt, 1]))
        actual = load_file(file)["latent_tensor"]
        assert ((actual - expected).abs().max() / expected.std()).item() <= 1e-4


def test_custom_samplers_of_saved_workflows(server: ComfyServer) -> None:
    graph = custom(node("KSamplerSelect", sampler_name="heun"))
    graph["save"]["inputs"]["samples"] = ["sample", 0]
    expected = latent(server, graph)
    ours = copy.deepcopy(graph) | {
        "workers": WORKERS,
        "ray": node("RayUNETLoader", **graph["model"]["inputs"], ray_actors_init=["workers", 0]),
    }
    ours["sample"] = node("XFuserSamplerCustomAdvanced", **graph["sample"]["inputs"], ray_actors=["ray", 0])
    plain_one = copy.deepcopy(ours)
    plain_one["sample"] = node(
        "XFuserSamplerCustom",
        ray_actors=["ray", 0],
        add_noise=True,
        noise_seed=5,
        cfg=3.0,
        positive=["positive", 1],
        negative=["negative", 1],
        sampler=["sampler", 0],
        sigmas=["sigmas", 0],
        latent_image=["latent", 0],
    )
    for one in (ours, plain_one):
        actual = latent(server, one)
        assert ((actual - expected).abs().max() / expected.std()).item() <= 1e-4


def test_rejects_a_patch_that_cannot_be_sent_and_names_its_node(server: ComfyServer) -> None:
    graph = behind_the_model(patch=node("ForeignPatch", secret=True))
    with pytest.raises(
        PromptFailed,
        match=r"the node Foreign Patch changes the inside of the model in a way that "
        r"cannot be sent to the workers \(.*lock",
    ):
        server.run(on_ray(graph), timeout=120)
    latent(server, on_ray(plain()))
