"""The card of a template in ComfyUI's menu: its model, its task, and a drawing of the GPUs' work."""

from __future__ import annotations

from PIL import Image

from .canvas import SIZE, Canvas
from .diagrams import DIAGRAMS
from .template import Template

MOST_BYTES = 40_000
_QUALITY = 82
# The colors of a card from top to bottom, and the season of its picture, by how the name of its model begins.
_LOOKS = {
    "Wan": ((50, 42, 104), (14, 14, 34), 0),
    "Flux": ((104, 44, 62), (28, 12, 26), 2),
    "Qwen": ((16, 82, 94), (8, 22, 36), 1),
    "Hunyuan": ((26, 88, 60), (8, 26, 24), 3),
    "LTX": ((28, 64, 120), (8, 16, 40), 2),
    "MiniMax": ((110, 60, 24), (32, 14, 10), 3),
    "Z-Image": ((84, 40, 104), (24, 10, 32), 1),
    "Chroma": ((96, 84, 20), (28, 22, 8), 0),
}


def draw(template: Template) -> bytes:
    """Return a square JPEG of at most MOST_BYTES."""
    top, bottom, season = next(look for name, look in _LOOKS.items() if template.model.startswith(name))
    canvas = Canvas(_ground(top, bottom))
    canvas.text((32, 34), template.model, 44, bold=True)
    canvas.text((33, 90), template.task, 23, fill=(205, 208, 226))
    DIAGRAMS[template.mode](canvas, season, "video" in template.task.lower())
    width = canvas.width_of(template.mode.value, 22) + 36
    canvas.box((32, 444, 32 + width, 484), fill=(255, 255, 255), radius=20)
    canvas.text((50, 453), template.mode.value, 22, fill=bottom, bold=True)
    canvas.text((SIZE - 32 - canvas.width_of("Raylight", 22), 453), "Raylight", 22, fill=(205, 208, 226))
    return canvas.jpeg(_QUALITY)


def _ground(top: tuple[int, int, int], bottom: tuple[int, int, int]) -> Image.Image:
    """Return a background that gets darker downwards, with a soft light at the upper left."""
    ramp = Image.linear_gradient("L").resize((SIZE, SIZE))
    ground = Image.composite(Image.new("RGB", (SIZE, SIZE), bottom), Image.new("RGB", (SIZE, SIZE), top), ramp)
    light = Image.radial_gradient("L").point(lambda distance: max(0, 130 - distance) * 2 // 3)
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(light.resize((2 * SIZE, 2 * SIZE)), (-SIZE, -SIZE - SIZE // 4))
    return Image.composite(Image.new("RGB", (SIZE, SIZE), tuple(min(255, part + 80) for part in top)), ground, mask)
