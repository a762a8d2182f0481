"""The work of the GPUs in each mode, drawn in the middle of a card."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image, ImageDraw

from .canvas import Canvas, Color
from .template import Mode

GPUS = 4
COLORS: tuple[Color, ...] = ((104, 168, 255), (255, 176, 92), (122, 220, 150), (240, 128, 176))
SOFT: Color = (190, 194, 216)
DARK: Color = (18, 20, 32)
_LEFT, _RIGHT, _GAP = 32, 480, 16
_WIDTH = (_RIGHT - _LEFT - _GAP * (GPUS - 1)) / GPUS
_GPU_TOP, _GPU_BOTTOM = 338, 408


def usp(canvas: Canvas, season: int, moving: bool) -> None:
    """Draw one picture, a strip of its tokens per GPU, and their exchange."""
    picture = scene(season, 2.74)
    if moving:
        for frame in (2, 1):
            shade = 118 - 26 * frame
            canvas.box(
                (_LEFT + 10 * frame, 146 - 8 * frame, _RIGHT - 10 * frame, 151 - 8 * frame),
                fill=(shade, shade + 4, shade + 36),
                radius=3,
            )
    for gpu in range(GPUS):
        left = _x(gpu)
        part = picture.crop((picture.width * gpu // GPUS, 0, picture.width * (gpu + 1) // GPUS, picture.height))
        canvas.paste(part, (left, 146, left + _WIDTH, 292))
        canvas.box((left, 286, left + _WIDTH, 292), fill=COLORS[gpu], radius=2)
        canvas.arrow((_middle(gpu), 300), (_middle(gpu), 330), COLORS[gpu])
    _gpus(canvas)
    for gpu in range(GPUS - 1):
        canvas.line(((_x(gpu) + _WIDTH - 1, 372), (_x(gpu + 1) + 1, 372)), SOFT, 3)


def fsdp(canvas: Canvas, season: int, moving: bool) -> None:
    """Draw a model's blocks, each cut into one shard per GPU."""
    _blocks(canvas, 146, 290)
    for gpu in range(GPUS):
        canvas.arrow((_middle(gpu), 300), (_middle(gpu), 330), COLORS[gpu])
    _gpus(canvas)


def offload(canvas: Canvas, season: int, moving: bool) -> None:
    """Draw the same shards in system memory, from where blocks go to the GPUs."""
    _gpus(canvas, 146, 206)
    for gpu in range(GPUS):
        canvas.arrow((_middle(gpu), 252), (_middle(gpu), 216), COLORS[gpu])
    canvas.box((_LEFT - 10, 258, _RIGHT + 10, 418), outline=SOFT, radius=10)
    _blocks(canvas, 272, 380)
    canvas.text(((_LEFT + _RIGHT) / 2, 400), "system memory", 19, fill=SOFT, centered=True)


def data_parallel(canvas: Canvas, season: int, moving: bool) -> None:
    """Draw a separate picture on each GPU."""
    for gpu in range(GPUS):
        left = _x(gpu)
        canvas.box((left, 146, left + _WIDTH, 172), fill=COLORS[gpu], radius=6)
        canvas.text((_middle(gpu), 159), f"prompt {gpu + 1}", 16, fill=DARK, centered=True)
        canvas.arrow((_middle(gpu), 176), (_middle(gpu), 196), COLORS[gpu])
        canvas.paste(scene(gpu, 1.09), (left, 204, left + _WIDTH, 296))
        canvas.arrow((_middle(gpu), 330), (_middle(gpu), 304), COLORS[gpu])
    _gpus(canvas)


def cfg_parallel(canvas: Canvas, season: int, moving: bool) -> None:
    """Draw the positive prompt on one half of the GPUs and the negative one on the other."""
    for half, (label, color) in enumerate((("positive", COLORS[2]), ("negative", (236, 104, 104)))):
        first = half * GPUS // 2
        left, right = _x(first), _x(first + 1) + _WIDTH
        canvas.paste(scene(4 if half else season, 1.86), (left, 146, right, 262))
        canvas.box((left, 250, right, 290), fill=color, radius=6)
        canvas.text(((left + right) / 2, 270), label, 20, fill=DARK, centered=True)
        for gpu in (first, first + 1):
            canvas.arrow((_middle(gpu), 298), (_middle(gpu), 330), color)
    _gpus(canvas, colors=(COLORS[2], COLORS[2], (236, 104, 104), (236, 104, 104)))


def drop_in(canvas: Canvas, season: int, moving: bool) -> None:
    """Draw an ordinary loader in a chain of nodes, with GPUs behind it."""
    _node(canvas, (_LEFT, 150, 244, 236), "Load Model (Ray)", (70, 78, 150))
    _node(canvas, (316, 150, _RIGHT, 236), "KSampler", (62, 64, 76))
    canvas.line(
        [(244 + 72 * t, 200 - 26 * (3 * t * t - 2 * t**3) + 13) for t in (n / 20 for n in range(21))],
        (190, 140, 255),
        4,
    )
    canvas.circle((244, 213), 6, (190, 140, 255))
    canvas.circle((316, 187), 6, (190, 140, 255))
    for gpu in range(GPUS):
        canvas.line(((138, 236), (138, 280), (_middle(gpu), 280), (_middle(gpu), 322)), COLORS[gpu], 2.5)
        canvas.arrow((_middle(gpu), 300), (_middle(gpu), 330), COLORS[gpu])
    _gpus(canvas)


def loras(canvas: Canvas, season: int, moving: bool) -> None:
    """Draw two LoRAs on a model on all GPUs."""
    for place, (label, color) in enumerate((("LoRA 1", COLORS[1]), ("LoRA 2", COLORS[3]))):
        left = _x(place * 2)
        canvas.box((left, 146, left + 2 * _WIDTH + _GAP, 184), fill=color, radius=8)
        canvas.text((left + _WIDTH + _GAP / 2, 165), label, 20, fill=DARK, centered=True)
        canvas.arrow((left + _WIDTH + _GAP / 2, 188), (left + _WIDTH + _GAP / 2, 206), color)
    canvas.text(((_LEFT + _RIGHT) / 2, 165), "+", 24, centered=True)
    picture = scene(season, 4.9)
    for gpu in range(GPUS):
        part = picture.crop((picture.width * gpu // GPUS, 0, picture.width * (gpu + 1) // GPUS, picture.height))
        canvas.paste(part, (_x(gpu), 214, _x(gpu) + _WIDTH, 296))
        canvas.arrow((_middle(gpu), 302), (_middle(gpu), 330), COLORS[gpu])
    _gpus(canvas)


DIAGRAMS: dict[Mode, Callable[[Canvas, int, bool], None]] = {
    Mode.USP: usp,
    Mode.FSDP: fsdp,
    Mode.OFFLOAD: offload,
    Mode.DATA: data_parallel,
    Mode.CFG: cfg_parallel,
    Mode.DROP_IN: drop_in,
    Mode.LORAS: loras,
}

# Skies, hills and suns: spring, summer, autumn, a winter night, and one without color.
_SCENES = (
    ((255, 214, 196), (120, 150, 220), ((92, 120, 150), (66, 96, 120), (40, 66, 88)), (255, 246, 220)),
    ((190, 230, 255), (70, 140, 230), ((120, 180, 110), (84, 150, 84), (52, 112, 66)), (255, 240, 160)),
    ((255, 206, 140), (200, 110, 90), ((190, 110, 60), (150, 78, 46), (104, 52, 38)), (255, 232, 190)),
    ((70, 84, 140), (16, 20, 50), ((200, 212, 236), (150, 166, 204), (104, 120, 168)), (240, 244, 255)),
    ((150, 152, 160), (92, 94, 104), ((112, 114, 122), (88, 90, 98), (64, 66, 74)), (190, 192, 198)),
)


def scene(season: int, ratio: float) -> Image.Image:
    """Draw hills under a sky with this ratio of width to height, cropped at the sides or the top."""
    low, high, hills, sun = _SCENES[season]
    size = (640, 300)
    ramp = Image.linear_gradient("L").resize(size)
    picture = Image.composite(Image.new("RGB", size, low), Image.new("RGB", size, high), ramp)
    pen = ImageDraw.Draw(picture)
    pen.ellipse((366, 62, 440, 136), fill=sun)
    outlines = (
        ((0, 190), (110, 120), (210, 180), (330, 110), (450, 190), (560, 130), (640, 180)),
        ((0, 230), (150, 180), (280, 235), (420, 175), (540, 230), (640, 200)),
        ((0, 250), (120, 262), (260, 238), (400, 268), (640, 244)),
    )
    for outline, color in zip(outlines, hills, strict=True):
        pen.polygon([*outline, (640, 300), (0, 300)], fill=color)
    width, height = min(640, round(300 * ratio)), min(300, round(640 / ratio))
    left, top = min(640 - width, 240), (300 - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _gpus(
    canvas: Canvas, top: float = _GPU_TOP, bottom: float = _GPU_BOTTOM, colors: tuple[Color, ...] = COLORS
) -> None:
    for gpu in range(GPUS):
        left = _x(gpu)
        for pin in range(5):  # the contacts of a card
            x = left + 16 + pin * (_WIDTH - 32) / 4
            canvas.box((x - 3, bottom - 2, x + 3, bottom + 8), fill=(150, 154, 176), radius=1)
        canvas.box((left, top, left + _WIDTH, bottom), fill=DARK, outline=colors[gpu], radius=9, width=3)
        canvas.text(
            (_middle(gpu), (top + bottom) / 2 - 1), f"GPU {gpu}", 20, fill=colors[gpu], bold=True, centered=True
        )


def _blocks(canvas: Canvas, top: float, bottom: float, rows: int = 5) -> None:
    height = (bottom - top - 8 * (rows - 1)) / rows
    for row in range(rows):
        y = top + row * (height + 8)
        for gpu in range(GPUS):
            canvas.box((_x(gpu), y, _x(gpu) + _WIDTH, y + height), fill=COLORS[gpu], radius=4)


def _node(canvas: Canvas, box: tuple[float, float, float, float], title: str, color: Color) -> None:
    left, top, right, _ = box
    canvas.box(box, fill=(44, 46, 58), outline=(98, 102, 128), radius=9)
    canvas.box((left, top, right, top + 30), fill=color, radius=9)
    canvas.box((left, top + 16, right, top + 30), fill=color, radius=1)
    canvas.text((left + 12, top + 6), title, 17)
    for row in range(2):
        canvas.box((left + 14, top + 42 + row * 20, right - 40, top + 54 + row * 20), fill=(70, 74, 94), radius=5)


def _x(gpu: int) -> float:
    return _LEFT + gpu * (_WIDTH + _GAP)


def _middle(gpu: int) -> float:
    return _x(gpu) + _WIDTH / 2
