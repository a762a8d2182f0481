"""What ComfyUI imports: registers the nodes, and does nothing else."""

import os
import sys

# `raylight` must have its plain name, here and in the workers, because Ray pickles by module name.
# Appended, since ComfyUI's own `nodes` must stay what `import nodes` finds.
_ROOT = os.path.dirname(os.path.realpath(__file__))
if _ROOT not in sys.path:
    sys.path.append(_ROOT)

from raylight.driver import preflight

preflight.log_problems()  # before the nodes: a ComfyUI that is too old for them should at least say so

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./nodes/web"  # a help page for each node, in docs/

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
