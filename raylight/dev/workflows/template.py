"""A template: its file's name, the text of its card, and its builder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from .workflow import Json, Workflow


class Mode(Enum):
    """How a template uses several GPUs; the value is the text on its card."""

    USP = "USP"
    FSDP = "FSDP"
    OFFLOAD = "FSDP + USP, CPU offload"
    DATA = "Data parallel"
    CFG = "CFG parallel"
    DROP_IN = "Drop-in loader"
    LORAS = "Several LoRAs"


@dataclass(frozen=True, slots=True)
class Template:
    name: str
    model: str
    task: str
    mode: Mode
    build: Callable[[Workflow], None]

    def to_json(self) -> Json:
        """Return the content of its file."""
        workflow = Workflow(self.name)
        self.build(workflow)
        return workflow.to_json()
