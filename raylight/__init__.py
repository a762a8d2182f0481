"""Raylight: several GPUs sample one image or video together, inside ComfyUI."""

__version__ = "0.1.0"
