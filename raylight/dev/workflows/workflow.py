"""A workflow in the format of ComfyUI's frontend: nodes in titled groups, groups in columns, and links."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from . import layout
from .elements import Group, Node, Output
from .models import ModelFile

Json = dict[str, Any]


class Workflow:
    """Add nodes to the open group, and groups to the open column."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[Node] = []
        self.columns: list[list[Group]] = []

    @contextmanager
    def group(self, title: str, *, color: str = layout.BLUE, column: bool = False) -> Iterator[None]:
        """Open a group: below the last one, or with `column` at the top of a new column at the right."""
        if column or not self.columns:
            self.columns.append([])
        self.columns[-1].append(Group(title, color))
        yield

    def add(
        self,
        kind: str,
        /,
        *,
        title: str | None = None,
        control: str = "randomize",
        files: Sequence[ModelFile] = (),
        bypassed: bool = False,
        **inputs: Any,
    ) -> Node:
        """Add a node to the open group, without the inputs that are None.

        Raises ValueError: it does not have these inputs, or they do not fit.
        """
        given = {name: value for name, value in inputs.items() if value is not None}
        node = Node(len(self.nodes) + 1, kind, given, title, control, tuple(files), bypassed)
        slots = {slot.name: slot.type for slot in node.signature.slots}
        slots |= {widget.name: widget.type for widget in node.signature.widgets}
        for name, value in inputs.items():
            if name not in slots:
                raise ValueError(f"{kind} has no input {name}")
            if isinstance(value, Output) and value.type != slots[name]:
                raise ValueError(f"{kind}: {name} takes {slots[name]}, not {value.type} of {value.node.type}")
        missing = [s.name for s in node.signature.slots if not s.optional and s.name not in given]
        if missing:
            raise ValueError(f"{kind}: nothing comes to {', '.join(missing)}")
        self.nodes.append(node)
        self.columns[-1][-1].nodes.append(node)
        return node

    def to_json(self) -> Json:
        """Return the file's content."""
        boxes = layout.place(self.columns)
        links = [
            (source, node, place)
            for node in self.nodes
            for place, (_, source, _) in enumerate(node.links)
            if source is not None
        ]
        numbers = {(node.number, place): number for number, (_, node, place) in enumerate(links, 1)}
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"raylight/{self.name}")),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(links),
            "nodes": [self._node(node, numbers, links, order) for order, node in enumerate(self.nodes)],
            "links": [
                [number, source.node.number, source.index, node.number, place, source.type]
                for number, (source, node, place) in enumerate(links, 1)
            ],
            "groups": [
                {
                    "id": number,
                    "title": group.title,
                    "bounding": list(box),
                    "color": group.color,
                    "font_size": 24,
                    "flags": {},
                }
                for number, (group, box) in enumerate(boxes, 1)
            ],
            "config": {},
            "extra": {"ds": {"scale": 0.6, "offset": [60, 80]}},
            "version": 0.4,
        }

    def _node(self, node: Node, numbers: dict[tuple[int, int], int], links: list[Any], order: int) -> Json:
        inputs = []
        for place, (slot, _, is_widget) in enumerate(node.links):
            entry: Json = {"name": slot.name, "type": slot.type, "link": numbers.get((node.number, place))}
            if slot.optional:
                entry["shape"] = 7  # how the frontend draws a place that may stay empty
            if is_widget:
                entry["widget"] = {"name": slot.name}
            inputs.append(entry)
        outputs = [
            {
                "name": slot.name,
                "type": slot.type,
                "slot_index": index,
                "links": [
                    number
                    for number, (source, _, _) in enumerate(links, 1)
                    if source.node is node and source.index == index
                ],
            }
            for index, slot in enumerate(node.signature.outputs)
        ]
        content: Json = {
            "id": node.number,
            "type": node.type,
            "pos": list(node.position),
            "size": list(node.size),
            "flags": {},
            "order": order,
            "mode": 4 if node.bypassed else 0,
            "inputs": inputs,
            "outputs": outputs,
        }
        if node.title:
            content["title"] = node.title
        if node.type == "MarkdownNote":
            return content | {"properties": {}, "widgets_values": node.values, "color": "#222", "bgcolor": "#000"}
        content["properties"] = {"Node name for S&R": node.type}
        if node.files:
            content["properties"]["models"] = [
                {"name": file.name, "url": file.url, "directory": file.directory} for file in node.files
            ]
        content["widgets_values"] = node.values
        return content | layout.colors(node.type, node.title)
