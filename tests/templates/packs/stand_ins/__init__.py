"""A ComfyUI pack for tests: text encoders, image encoders and VAEs without their files' weights, and a latent's probe.

What surrounds the diffusion model of a template takes gigabytes and says nothing about how that model is sampled. So a
file that holds `MARK` holds only what ComfyUI's detection asks of such a file; ComfyUI builds what it detects, and here
it gets random weights from a fixed seed. Text encoders keep their real tokenizers, hidden width and layers, but their
attention, feed-forward and vocabulary are narrow. Diffusion models are not touched: nothing here is known to workers.
"""

from .latents import NODE_CLASS_MAPPINGS
from .weightless import install

install()

__all__ = ["NODE_CLASS_MAPPINGS"]
