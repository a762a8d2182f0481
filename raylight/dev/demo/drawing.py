"""The demo's graphs: a picture of a prompt, by stock nodes and on workers in two ways."""

from __future__ import annotations

from . import graphs
from .graphs import Graph, Sampling

Job = Sampling


def stock(job: Job, text: str, vae: str, prefix: str) -> Graph:
    """Return a graph of UNETLoader and KSampler (Advanced), without Raylight."""
    return _from_text(graphs.stock(job, prefix), text, vae, prefix)


def sampler_node(job: Job, text: str, vae: str, prefix: str, workers: int) -> Graph:
    """Return a graph of Ray Initializer, Load Diffusion Model (Ray), XFuser KSampler (Advanced) and Parallelize VAE
    (Ray).
    """
    graph = _from_text(graphs.on_workers(job, workers, prefix), text, vae, prefix)
    graph["split"] = {"class_type": "RayParallelizeVAE", "inputs": {"vae": ["vae", 0], "ray_actors": ["model", 0]}}
    graph["decode"]["inputs"]["vae"] = ["split", 0]
    return graph


def drop_in(job: Job, text: str, vae: str, prefix: str, workers: int) -> Graph:
    """Return the stock graph with Load Diffusion Model as MODEL (Ray) and Load VAE (Ray) in place of its loaders."""
    graph = stock(job, text, vae, prefix)
    graph["workers"] = graphs.on_workers(job, workers)["workers"]
    graph["model"] = {
        "class_type": "RayModelLoader",
        "inputs": graph["model"]["inputs"] | {"ray_actors_init": ["workers", 0]},
    }
    graph["vae"] = {
        "class_type": "RayVAELoaderAsVAE",
        "inputs": graph["vae"]["inputs"] | {"ray_actors_init": ["workers", 0]},
    }
    return graph


def _from_text(graph: Graph, text: str, vae: str, prefix: str) -> Graph:
    """Replace a graph's stored conditioning by text, and also decode its latent and save it as a picture."""
    sample = graph["sample"]
    inputs = sample["inputs"] | {"positive": ["positive", 0], "negative": ["negative", 0]}
    return graph | {
        "clip": {"class_type": "RaylightDemoWords", "inputs": {}},
        "positive": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": text}},
        "negative": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": ""}},
        "sample": sample | {"inputs": inputs},
        "vae": {"class_type": "VAELoader", "inputs": {"vae_name": vae}},
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["vae", 0]}},
        "picture": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": prefix}},
    }
