"""MiniMax H3's VAEs, which workers never load, at a small size instead of 2.6 billion weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import comfy.ldm.minimax.audio_vae as audio
import comfy.ldm.minimax.vae as video


@contextmanager
def classes() -> Iterator[None]:
    """Let ComfyUI build small ones."""
    stock = video.MiniMaxH3VideoVAE, video.ViT3DDecoder, audio.MiniMaxH3AudioVAE
    video.MiniMaxH3VideoVAE = partial(stock[0], ch=32, num_res_blocks=1)
    video.ViT3DDecoder = partial(stock[1], num_layers=2, heads=2)
    audio.MiniMaxH3AudioVAE = partial(stock[2], encoder_dim=16, latent_dim=512, decoder_dim=256)
    try:
        yield
    finally:
        video.MiniMaxH3VideoVAE, video.ViT3DDecoder, audio.MiniMaxH3AudioVAE = stock
