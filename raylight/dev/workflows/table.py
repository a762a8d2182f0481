"""All templates."""

from . import animate, chroma, flux, flux2, hunyuan, ltx, minimax, qwen, wan, zimage
from .template import Template

TEMPLATES: tuple[Template, ...] = (
    *wan.TEMPLATES,
    *animate.TEMPLATES,
    *ltx.TEMPLATES,
    *minimax.TEMPLATES,
    *hunyuan.TEMPLATES,
    *flux.TEMPLATES,
    *flux2.TEMPLATES,
    *qwen.TEMPLATES,
    *zimage.TEMPLATES,
    *chroma.TEMPLATES,
)
