"""One sheet of all of the demo's pictures: a column per prompt, a row per way of sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE = 256
GAP = 10
LABEL = 30


def write_sheet(rows: Mapping[str, Sequence[Path]], prompts: Sequence[str], path: Path) -> None:
    """Write the named rows of pictures, one picture per prompt, with names and prompts beside them."""
    width = GAP + len(prompts) * (SIDE + GAP)
    sheet = Image.new("RGB", (width, LABEL + len(rows) * (LABEL + SIDE) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts):
        _write(draw, prompt, GAP + column * (SIDE + GAP), GAP, SIDE)
    for row, (name, pictures) in enumerate(rows.items()):
        top = LABEL + row * (LABEL + SIDE)
        _write(draw, name, GAP, top + GAP, width - 2 * GAP, "gray")
        for column, picture in enumerate(pictures):
            with Image.open(picture) as image:
                square = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(square, (GAP + column * (SIDE + GAP), top + LABEL))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def _write(draw: ImageDraw.ImageDraw, text: str, x: int, y: int, width: int, colour: str = "black") -> None:
    """Write text in the largest letters that fit, up to 15."""
    for size in range(15, 6, -1):
        font = ImageFont.load_default(size)
        if draw.textlength(text, font) <= width:
            break
    draw.text((x, y), text, colour, font)
