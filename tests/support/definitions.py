"""What ComfyUI declares of a node, as the frontend reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_WIDGETS = {"INT", "FLOAT", "FLOAT,INT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}


def inputs_of(definition: Any) -> Iterator[tuple[str, Any, dict[str, Any], bool]]:
    """Name, type (or the choices of a combo), options and whether it is optional, in order."""
    declared = definition.INPUT_TYPES()
    for group in ("required", "optional"):
        for name, spec in declared.get(group, {}).items():
            yield name, spec[0], spec[1] if len(spec) > 1 else {}, group == "optional"


def is_widget(kind: Any) -> bool:
    return isinstance(kind, list) or kind in _WIDGETS


def widgets_of(definition: Any) -> list[tuple[str, Any, dict[str, Any]]]:
    """What a node saves values of, in order, with the widgets that the frontend adds by itself."""
    found = []
    for name, kind, options, _ in inputs_of(definition):
        if is_widget(kind):
            found.append((name, kind, options))
            if options.get("control_after_generate"):
                found.append(("control_after_generate", ["fixed", "increment", "decrement", "randomize"], {}))
            if options.get("image_upload") or options.get("video_upload"):
                found.append(("upload", ["image"], {}))
    return found
