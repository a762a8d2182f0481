"""Prompts in the API format that were saved for older forms of nodes: put right before ComfyUI validates them.

ComfyUI makes True of any text at a BOOLEAN, so only here is it known that there was a text.
"""

from __future__ import annotations

import logging
from typing import Any

from raylight.attention import kernels
from raylight.host.prompt_server import prompt_server

logger = logging.getLogger(__name__)

INITIALIZERS = ("RayInitializer", "RayInitializerAdvanced")
KERNEL = "XFuser_attention"
SWITCHES = ("sync_ulysses", "clear_vram_after_sampling", "FSDP", "FSDP_CPU_OFFLOAD", "skip_comm_test", "use_mmap")


def register() -> None:
    """Have ComfyUI's server hand each prompt to `put_right` first. Without a server there are no prompts."""
    server = prompt_server()
    if server is not None:
        server.add_on_prompt_handler(_on_prompt)


def _on_prompt(data: dict[str, Any]) -> dict[str, Any]:
    prompt = data.get("prompt")
    if isinstance(prompt, dict):
        put_right(prompt)
    return data


def put_right(prompt: dict[str, Any]) -> None:
    """Change nodes of older forms, in place, to what they are called and hold today. Log what was changed."""
    for number, node in prompt.items():
        if not isinstance(node, dict) or not isinstance(inputs := node.get("inputs"), dict):
            continue
        kind = node.get("class_type")
        if kind in INITIALIZERS:
            _kernel_at_its_place(number, inputs)
        elif kind == "DPNoiseList" and (seeds := [v for v in inputs.values() if isinstance(v, int)]):
            node["class_type"] = "DPNoiseListSeeds"
            node["inputs"] = {f"seed_{slot}": seed for slot, seed in enumerate(seeds, start=1)}
            logger.info("node %s is read as an older DP Noise List, which has seeds", number)
        elif kind == "XFuserSamplerCustomAdvanced" and "noise_seed" in inputs:
            node["class_type"] = "XFuserSamplerCustomAdvancedSeed"
            inputs.setdefault("add_noise", True)
            logger.info("node %s is read as an older XFuser SamplerCustomAdvanced, which has a seed", number)


def _kernel_at_its_place(number: str, inputs: dict[str, Any]) -> None:
    """Move an attention kernel from a switch to its own input, and give the switch its default, which is off."""
    landed = [name for name in SWITCHES if inputs.get(name) in kernels.NAMES]
    if not landed:
        return
    inputs[KERNEL] = [inputs.pop(name) for name in landed][-1]
    logger.warning(
        "node %s was saved by an older Ray Initializer: the attention kernel %s stood at %s, which is off now",
        number,
        inputs[KERNEL],
        " and ".join(landed),
    )
