"""What is gathered together: one unit per transformer block, and the rest of the model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

SMALLEST_SHARE = 0.002  # of the model's weights: below it an all-gather of its own costs more than it saves


def units(model: nn.Module) -> dict[str, nn.Module]:
    """The transformer blocks of a model by name, in the order of the model.

    A block is an entry of an outermost `nn.ModuleList` that holds at least `SMALLEST_SHARE` of the weights: every DiT
    of ComfyUI keeps its blocks in such lists. Lists of lists are looked into.
    """
    least = SMALLEST_SHARE * _size(model)
    return {name: block for name, block in _entries(model, "") if _size(block) >= least}


def _entries(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(module, nn.ModuleList) and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield path, child
        else:
            yield from _entries(child, f"{path}.")


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
