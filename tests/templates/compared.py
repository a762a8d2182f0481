"""What two runs of a prompt gave, and how close it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from raylight.demo.comfy_replies import History
from raylight.demo.comfy_server import ComfyServer
from raylight.demo.graphs import Graph

TOLERANCE = 1e-4
PIXEL = 1 / 255
IN_FILES = 2.0


def run(server: ComfyServer, graph: Graph) -> list[tuple[str, Any]]:
    """What a prompt gave: its latents and its pictures, in the order of their nodes."""
    history: History = server.run(graph, timeout=420)
    outputs = []
    for node in sorted(history.outputs):
        for path in server.output_files(history, node):
            if path.suffix == ".pt":
                outputs.append((node, torch.load(path)))
            elif path.suffix in (".png", ".mp4", ".webm", ".webp"):
                outputs.append((node, frames(path)))
    # What is nearest to the sampler first: later differences follow from earlier ones.
    order = {"latent": 0, "image": 1}
    return sorted(outputs, key=lambda output: order.get(output[0].split()[0], 2))


def frames(path: Path) -> list[torch.Tensor]:
    import av
    import numpy

    if path.suffix == ".png":
        return [torch.from_numpy(numpy.array(Image.open(path))).float()]
    with av.open(str(path)) as container:
        return [torch.from_numpy(frame.to_ndarray(format="rgb24")).float() for frame in container.decode(video=0)]


def compare(node: str, actual: list[torch.Tensor], expected: list[torch.Tensor]) -> str:
    """Raise where two runs differ; a line of how close they are otherwise."""
    assert [part.shape for part in actual] == [part.shape for part in expected], node
    distances = [(a - e).abs() for a, e in zip(actual, expected, strict=True)]
    spread = max(part.std().item() for part in expected)
    assert all(part.isfinite().all() for part in expected) and spread > 0, f"{node}: the stock run says nothing"
    distance, mean = max(d.max().item() for d in distances), max(d.mean().item() for d in distances)
    if node.startswith("latent"):
        assert distance / spread <= TOLERANCE, f"{node}: latents differ by {distance / spread:.1e}"
        return f"{node} {distance / spread:.1e}"
    if node.startswith("image"):
        assert distance <= PIXEL, f"{node}: decoded pictures differ by {distance:.1e}"
        return f"{node} {distance:.1e}"
    # Files: a video's compression makes more of a small difference, in some places.
    assert mean <= IN_FILES, f"{node}: files differ by {mean:.1f} of 255"
    return f"{node} {mean:.2f}/255"
