"""The part of a weight's patches that concerns some of its rows."""

from __future__ import annotations

from typing import Any

from comfy.weight_adapter import LoHaAdapter, LoRAAdapter
from torch import Tensor

# ComfyUI's form of one patch: strength, what it adds, strength of the model, (dim, start, length) or None, a function.
Patch = tuple[float, Any, float, tuple[int, int, int] | None, Any]


def of_rows(patches: list[Patch], rows: slice, height: int) -> list[Patch] | None:
    """The patches for rows `rows` of a weight that has `height`, to be applied to these rows alone.

    A LoRA's update is a product, of which rows `rows` need the same rows of the left factor only (Hu et al., 2021,
    "LoRA"), and likewise for the two products of LoHa (Hyeon-Woo et al., 2021, "FedPara"). None where a patch looks at
    the whole weight, as DoRA's norm, LoKr's Kronecker product or OFT's rotation do.
    """
    result = []
    for strength, value, strength_model, part, function in patches:
        if function is not None:
            return None
        start, stop, cut_height = rows.start, rows.stop, height
        if part is not None and part[0] == 0:
            start, stop = max(rows.start, part[1]), min(rows.stop, part[1] + part[2])
            if start >= stop:
                continue
            cut = slice(start - part[1], stop - part[1])
            cut_height, part = part[2], (0, start - rows.start, stop - start)
        else:
            cut = slice(start, stop)
        value = _cut(value, cut, cut_height)
        if value is None:
            return None
        result.append((strength, value, strength_model, part, None))
    return result


def _cut(value: Any, rows: slice, height: int) -> Any:
    if isinstance(value, LoRAAdapter):
        up, down, alpha, mid, dora_scale, reshape = value.weights
        if any(special is not None for special in (mid, dora_scale, reshape)) or up.shape[0] != height:
            return None
        return LoRAAdapter(value.loaded_keys, (up[rows], down, alpha, mid, dora_scale, reshape))
    if isinstance(value, LoHaAdapter):
        w1a, w1b, alpha, w2a, w2b, t1, t2, dora_scale = value.weights
        if any(special is not None for special in (t1, t2, dora_scale)) or w1a.shape[0] != height:
            return None
        return LoHaAdapter(value.loaded_keys, (w1a[rows], w1b, alpha, w2a[rows], w2b, t1, t2, dora_scale))
    if isinstance(value, tuple) and value[0] in ("diff", "set") and len(value[1]) == 1:
        whole = value[1][0]
        return (value[0], (whole[rows],)) if isinstance(whole, Tensor) and whole.shape[0] == height else None
    return None
