"""All templates."""

from . import flux, hunyuan, qwen, wan
from .template import Template

TEMPLATES: tuple[Template, ...] = (*wan.TEMPLATES, *flux.TEMPLATES, *qwen.TEMPLATES, *hunyuan.TEMPLATES)
