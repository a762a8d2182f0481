"""What a workflow consists of: nodes, their outputs, and groups of nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .models import ModelFile
from .signatures import SIGNATURES, Signature, Slot


@dataclass(frozen=True, slots=True)
class Output:
    """An output of a node, as the value of another node's input."""

    node: Node
    index: int

    @property
    def type(self) -> str:
        return self.node.signature.outputs[self.index].type


@dataclass(eq=False, slots=True)
class Node:
    """A node and the values of its inputs: outputs of other nodes, or widget values."""

    number: int
    type: str
    inputs: dict[str, Any]
    title: str | None = None
    control: str = "randomize"
    files: tuple[ModelFile, ...] = ()
    bypassed: bool = False
    size: tuple[int, int] = (0, 0)
    position: tuple[int, int] = (0, 0)

    @property
    def signature(self) -> Signature:
        return SIGNATURES[self.type]

    def __getitem__(self, name: str) -> Output:
        """Return the output of this name."""
        names = [slot.name for slot in self.signature.outputs]
        if name not in names:
            raise KeyError(f"{self.type} has no output {name}, but {', '.join(names)}")
        return Output(self, names.index(name))

    @property
    def links(self) -> list[tuple[Slot, Output | None, bool]]:
        """Return its link inputs in order, the output connected to each, and whether the input belongs to a widget."""
        slots = [(slot, self.inputs.get(slot.name), False) for slot in self.signature.slots]
        widgets = [
            (Slot(widget.name, widget.type), value, True)
            for widget in self.signature.widgets
            if isinstance(value := self.inputs.get(widget.name), Output)
        ]
        return slots + widgets

    @property
    def values(self) -> list[Any]:
        """Return its widget values in the order in which they are saved."""
        values = []
        for widget in self.signature.widgets:
            value = self.inputs.get(widget.name, widget.default)
            values.append(widget.default if isinstance(value, Output) else value)
            if widget.control:
                values.append(self.control)
        return values


@dataclass(eq=False, slots=True)
class Group:
    """Nodes below each other under a title."""

    title: str
    color: str
    nodes: list[Node] = field(default_factory=list)
