"""The demo's text encoder as a ComfyUI node, so that prompts are typed into ComfyUI's own nodes.

The demo's ComfyUI loads this folder as a separate pack, beside Raylight.
"""

from __future__ import annotations

from inspect import cleandoc

from comfy_api.latest import ComfyExtension, io


class RaylightDemoWords(io.ComfyNode):
    """The text encoder of Raylight's demo model, as a CLIP for ComfyUI's text nodes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RaylightDemoWords",
            display_name="Load CLIP (Raylight's demo)",
            category="Raylight/demo",
            description=cleandoc(cls.__doc__),
            outputs=[io.Clip.Output(display_name="clip")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from raylight.dev.demo.clip import word_clip  # its package is on the path once Raylight's pack is loaded

        return io.NodeOutput(word_clip())


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [RaylightDemoWords]


async def comfy_entrypoint() -> Extension:
    return Extension()
