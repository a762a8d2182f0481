"""The results of two runs of a prompt, and how close they are.

Latents and pictures are compared as tensors, where they are made and where they go into an encoder. What a codec makes
of a difference in the last digit is not judged here. A file only has to play, and to have the frames of the other run's
file and of the encoder's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import torch
from PIL import Image, ImageSequence

from raylight.dev.demo.comfy_replies import History
from raylight.dev.demo.comfy_server import ComfyServer
from raylight.dev.demo.graphs import Graph

TOLERANCE = 1e-4
PIXEL = 1 / 255
LATENT, IMAGE, ENCODED = "latent", "image", "encoded"
"""How names of probes begin: a sampler's latent, a decoded picture, and one that goes to a node which encodes it."""
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_VIDEOS = (".mp4", ".webm", ".mkv")


@dataclass(frozen=True, slots=True)
class File:
    """A file that a node wrote: the number of frames that a player shows, their (width, height), and whether all have
    one color.
    """

    frames: int
    size: tuple[int, int]
    blank: bool


Output = tuple[str, "list[torch.Tensor] | File"]


def run(server: ComfyServer, graph: Graph) -> list[Output]:
    """Run a prompt; return its latents and pictures, in the order of their nodes, and its files."""
    history: History = server.run(graph, timeout=420)
    outputs: list[Output] = []
    for node in sorted(history.outputs):
        for path in server.output_files(history, node):
            if path.suffix == ".pt":
                outputs.append((node, torch.load(path)))
            elif path.suffix in _PICTURES + _VIDEOS:
                outputs.append((node, played(path)))
    # Nearest to the sampler first: later differences follow from earlier ones.
    order = {LATENT: 0, IMAGE: 1, ENCODED: 2}
    return sorted(outputs, key=lambda output: order.get(output[0].split()[0], 3))


def played(path: Path) -> File:
    """Decode all of a picture, an animation or a video. Raises the decoder's errors."""
    if path.suffix in _PICTURES:
        with Image.open(path) as picture:
            shown = [frame.convert("RGB") for frame in ImageSequence.Iterator(picture)]
    else:
        with av.open(str(path)) as container:
            shown = [frame.to_image() for frame in container.decode(video=0)]
    sizes = {frame.size for frame in shown}
    assert len(sizes) == 1, f"{path.name} shows pictures of these sizes: {sorted(sizes)}"
    blank = all(low == high for frame in shown for low, high in frame.getextrema())
    return File(len(shown), sizes.pop(), blank)


def compare(node: str, actual: list[torch.Tensor] | File, expected: list[torch.Tensor] | File) -> str:
    """Return a line that says how close two runs are. Raises AssertionError: they differ."""
    if isinstance(expected, File):
        assert not expected.blank, f"{node}: the stock run says nothing"
        assert actual == expected, f"{node}: {actual} instead of {expected}"
        return f"{node} {expected.frames} x {expected.size[0]}x{expected.size[1]}"
    assert [part.shape for part in actual] == [part.shape for part in expected], node
    distance = max((a - e).abs().max().item() for a, e in zip(actual, expected, strict=True))
    spread = max(part.std().item() for part in expected)
    assert all(part.isfinite().all() for part in expected) and spread > 0, f"{node}: the stock run says nothing"
    if node.startswith(LATENT):
        assert distance / spread <= TOLERANCE, f"{node}: latents differ by {distance / spread:.1e}"
        return f"{node} {distance / spread:.1e}"
    assert distance <= PIXEL, f"{node}: pictures differ by {distance:.1e}"
    return f"{node} {distance:.1e}"


def hold_together(outputs: Sequence[Output]) -> None:
    """Compare files with encoder inputs of the same run. Raises AssertionError: a file has not the frames of any of
    them.
    """
    given = {
        (len(part), part.shape[2], part.shape[1])
        for node, parts in outputs
        if node.startswith(ENCODED)
        for part in parts
    }
    # A node with several pictures writes one file for each, or one for all.
    allowed = given | {(1, width, height) for _, width, height in given}
    for node, value in outputs:
        if isinstance(value, File) and given:
            assert (value.frames, *value.size) in allowed, f"{node}: {value} of pictures (frames, W, H) {sorted(given)}"
