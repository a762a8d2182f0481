"""Attention on one rank: kernels by name. torch only, never ComfyUI or Ray."""
