"""A drawing with smooth edges: drawn larger, then reduced."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

SIZE = 512
_SCALE = 3
Color = tuple[int, int, int]
Box = tuple[float, float, float, float]
Point = tuple[float, float]
WHITE: Color = (255, 255, 255)


class Canvas:
    """A picture of SIZE x SIZE; all numbers are in pixels of the finished picture."""

    def __init__(self, ground: Image.Image) -> None:
        self._image = ground.resize((SIZE * _SCALE, SIZE * _SCALE), Image.Resampling.BICUBIC)
        self._draw = ImageDraw.Draw(self._image)

    def box(
        self, box: Box, *, fill: Color | None = None, outline: Color | None = None, radius: float = 6, width: float = 2
    ) -> None:
        self._draw.rounded_rectangle(_scaled(box), radius * _SCALE, fill, outline, round(width * _SCALE))

    def line(self, points: Sequence[Point], fill: Color, width: float = 2) -> None:
        self._draw.line([_scaled(point) for point in points], fill, round(width * _SCALE), joint="curve")

    def arrow(self, start: Point, end: Point, fill: Color, width: float = 2.5) -> None:
        """Draw a straight arrow along one of the axes."""
        self.line((start, end), fill, width)
        self._head(start, end, fill)

    def polygon(self, points: Sequence[Point], fill: Color) -> None:
        self._draw.polygon([_scaled(point) for point in points], fill)

    def circle(self, center: Point, radius: float, fill: Color) -> None:
        x, y = center
        self._draw.ellipse(_scaled((x - radius, y - radius, x + radius, y + radius)), fill)

    def paste(self, picture: Image.Image, box: Box, radius: float = 5) -> None:
        left, top, right, bottom = _scaled(box)
        size = (round(right - left), round(bottom - top))
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), radius * _SCALE, 255)
        self._image.paste(picture.resize(size, Image.Resampling.LANCZOS), (round(left), round(top)), mask)

    def text(
        self, place: Point, text: str, size: float, *, fill: Color = WHITE, bold: bool = False, centered: bool = False
    ) -> None:
        """Draw text; `place` is the upper left corner, or with `centered` the middle."""
        self._draw.text(
            _scaled(place),
            text,
            fill,
            _font(size),
            anchor="mm" if centered else "la",
            stroke_width=round(size * _SCALE / 45) if bold else 0,
            stroke_fill=fill,
        )

    def width_of(self, text: str, size: float) -> float:
        return self._draw.textlength(text, _font(size)) / _SCALE

    def jpeg(self, quality: int) -> bytes:
        file = io.BytesIO()
        self._image.resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(file, "JPEG", quality=quality, optimize=True)
        return file.getvalue()

    def _head(self, start: Point, end: Point, fill: Color, size: float = 7) -> None:
        (x0, y0), (x1, y1) = start, end
        dx, dy = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
        self.polygon(
            [
                (x1 + dx * 2, y1 + dy * 2),
                (x1 - dx * size - dy * size * 0.8, y1 - dy * size + dx * size * 0.8),
                (x1 - dx * size + dy * size * 0.8, y1 - dy * size - dx * size * 0.8),
            ],
            fill,
        )


def _scaled(numbers: Sequence[float]) -> tuple[float, ...]:
    return tuple(number * _SCALE for number in numbers)


@cache
def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * _SCALE)  # the one that Pillow brings: the same everywhere
