"""A video that workers sample and decode, in graphs of ComfyUI's own nodes on a real server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shared_server import MODEL, SharedServer
from vae_files import write_vae

from raylight.dev.demo.comfy_replies import PromptFailed
from raylight.dev.demo.graphs import Graph, Sampling, node, on_workers, stock

JOB = Sampling(MODEL, width=112, height=80, frames=5, steps=2, seed=31)
VAE = "narrow-wan-vae.safetensors"


@pytest.fixture(scope="module")
def server(shared_server: SharedServer) -> SharedServer:
    write_vae(shared_server.models / VAE, "wan-narrow")
    return shared_server


def decoded(graph: Graph, loader: dict[str, Any], decode: str = "VAEDecode", **tiles: int) -> Graph:
    """Return a graph that also decodes its latent, and encodes the picture again."""
    return graph | {
        "vae": loader,
        "decode": node(decode, samples=["sample", 0], vae=["vae", 0], **tiles),
        "picture": node("SaveImage", images=["decode", 0], filename_prefix="picture"),
        "encode": node("VAEEncode", pixels=["decode", 0], vae=["vae", 0]),
        "again": node("VAEDecode", samples=["encode", 0], vae=["vae", 0]),
        "picture again": node("SaveImage", images=["again", 0], filename_prefix="again"),
    }


def frames(server: SharedServer, graph: Graph, name: str) -> np.ndarray:
    files = server.output_files(server.run(graph, 180.0), name)
    return np.stack([pixels(path) for path in files])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape and expected.std() > 10
    assert np.abs(actual - expected).max() <= 1  # a difference in the last digits may round to another colour


def ours(job: Sampling = JOB) -> Graph:
    loader = node("RayVAELoaderAsVAE", vae_name=VAE, ray_actors=["model", 0])
    return decoded(on_workers(job, 2), loader)


@pytest.fixture(scope="module")
def expected(server: SharedServer) -> dict[str, np.ndarray]:
    history = server.run(decoded(stock(JOB), node("VAELoader", vae_name=VAE)), 180.0)
    return {
        name: np.stack([pixels(path) for path in server.output_files(history, name)])
        for name in ("picture", "picture again")
    }


def test_text_to_video_ends_on_workers(server: SharedServer, expected: dict[str, np.ndarray]) -> None:
    history = server.run(ours(), 180.0)
    for name, right in expected.items():
        assert_same(np.stack([pixels(path) for path in server.output_files(history, name)]), right)
    assert f"{VAE}: rows on 2 workers in" in server.log_tail(200)


def test_tiled_and_parallelized(server: SharedServer, expected: dict[str, np.ndarray]) -> None:
    tiles = {"tile_size": 64, "overlap": 16, "temporal_size": 8, "temporal_overlap": 4}
    graph = decoded(on_workers(JOB, 2), node("VAELoader", vae_name=VAE), "VAEDecodeTiled", **tiles)
    graph["split"] = node("RayParallelizeVAE", vae=["vae", 0], ray_actors_init=["workers", 0])
    for name in ("decode", "encode", "again"):
        graph[name]["inputs"]["vae"] = ["split", 0]
    assert_same(frames(server, graph, "picture"), expected["picture"])
    assert "the sizes of tiles have no effect" in server.log_tail(200)


def test_a_latent_of_another_model_is_refused_in_the_node(
    server: SharedServer, expected: dict[str, np.ndarray]
) -> None:
    graph = ours()
    graph["other"] = node("EmptyLatentImage", width=64, height=64, batch_size=1)
    graph["decode"]["inputs"]["samples"] = ["other", 0]
    with pytest.raises(PromptFailed, match=r"the latent has the shape \(1, 4, 8, 8\), and the VAE takes videos"):
        server.run(graph, 60.0)
    assert_same(frames(server, ours(), "picture"), expected["picture"])


def test_a_file_that_is_no_vae_is_refused_in_the_loader(server: SharedServer) -> None:
    graph = ours()
    graph["vae"]["inputs"]["vae_name"] = MODEL
    with pytest.raises(PromptFailed, match=f"{MODEL} cannot be loaded as a VAE: its tensors"):
        server.run(graph, 60.0)
