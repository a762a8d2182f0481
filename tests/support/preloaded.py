"""What the server that ranks of the tests are forked from imports once: PyTorch, ComfyUI and what ranks do."""

from __future__ import annotations

import eight_bit_cases
import external_cases
import gguf_cases
import loaded_cases
import pytest
import row_cases
import sharded_cases
import split_cases
import vae_split_cases

__all__ = [
    "eight_bit_cases",
    "external_cases",
    "gguf_cases",
    "loaded_cases",
    "pytest",
    "row_cases",
    "sharded_cases",
    "split_cases",
    "vae_split_cases",
]
