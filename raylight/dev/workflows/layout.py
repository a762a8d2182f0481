"""Sizes of nodes, and their positions in groups and columns."""

from __future__ import annotations

import re

from .elements import Group, Node

BLUE, GREEN = "#3f789e", "#3f8a5c"
Box = tuple[int, int, int, int]

_TITLE, _SLOT, _WIDGET, _MARGIN = 30, 20, 26, 12
_GAP, _PADDING, _GROUP_TITLE, _BETWEEN = 46, 20, 70, 40
_WIDTH = 330
# Nodes whose size is not the sum of their rows: (width, height).
_SIZES = {
    "CLIPTextEncode": (420, 170),
    "TextEncodeQwenImageEditPlus": (420, 220),
    "LoadImage": (330, 330),
    "SaveImage": (480, 480),
    "SaveVideo": (480, 480),
    "RayInitializer": (330, 430),
    "RayLoraLoader": (400, 86),
    "RayModelLoader": (400, 106),
    "RayUNETLoader": (400, 106),
    "RayVAELoaderAsVAE": (400, 102),
    "VAELoader": (400, 62),
    "CheckpointLoaderSimple": (400, 102),
    "LTXAVTextEncoderLoader": (400, 110),
    "MiniMaxH3ImageToVideo": (420, 360),
    "LoadVideo": (330, 330),
    "CLIPLoader": (400, 110),
    "DualCLIPLoader": (400, 134),
    # With room for the preview.
    "KSampler": (330, 540),
    "KSamplerAdvanced": (330, 580),
    "XFuserKSamplerAdvanced": (330, 640),
    "SamplerCustomAdvanced": (330, 400),
}
_NOTE_WIDTH, _NOTE_LETTERS, _NOTE_LINE, _NOTE_ROW, _NOTE_HEADING, _NOTE_SPACE = 520, 84, 15, 22, 36, 7
_PROMPT_COLORS = {"positive": {"color": "#232", "bgcolor": "#353"}, "negative": {"color": "#322", "bgcolor": "#533"}}
_OURS = {"color": "#223", "bgcolor": "#335"}


def place(columns: list[list[Group]]) -> list[tuple[Group, Box]]:
    """Give all nodes a size and a position, and return the groups with their boxes: x, y, width, height."""
    boxes, x = [], 0
    for column in columns:
        width = max(size(node)[0] for group in column for node in group.nodes)
        y = 0
        for group in column:
            top = y
            y += _GROUP_TITLE + _TITLE // 2
            for node in group.nodes:
                node.size = (width, size(node)[1])
                node.position = (x + _PADDING, y)
                y += node.size[1] + _GAP
            y += _PADDING - _GAP + _MARGIN
            boxes.append((group, (x, top, width + 2 * _PADDING, y - top)))
            y += _BETWEEN
        x += width + 2 * _PADDING + _BETWEEN
    return boxes


def size(node: Node) -> tuple[int, int]:
    """Return width and height without the title."""
    if node.type == "MarkdownNote":
        return _NOTE_WIDTH, 60 + sum(_note_line(line) for line in node.inputs["text"].splitlines())
    if node.type in _SIZES:
        return _SIZES[node.type]
    slots = max(len(node.links), len(node.signature.outputs))
    return _WIDTH, _MARGIN + _SLOT * slots + _WIDGET * len(node.values)


def _note_line(line: str) -> int:
    """Return the height of a line of Markdown; a link shows only its text."""
    shown = re.sub(r"\]\([^)]*\)", "]", line)
    if not shown:
        return _NOTE_SPACE
    if shown.startswith("|"):
        return _NOTE_ROW
    return _NOTE_HEADING if shown.startswith("#") else _NOTE_LINE * -(-len(shown) // _NOTE_LETTERS)


def colors(type: str, title: str | None) -> dict[str, str]:
    """Return green and red for the two prompts, as in ComfyUI's own templates, and a color for this pack's nodes."""
    if type.startswith(("Ray", "XFuser", "DP")):
        return dict(_OURS)
    for word, found in _PROMPT_COLORS.items():
        if title and word in title.lower():
            return dict(found)
    return {}
