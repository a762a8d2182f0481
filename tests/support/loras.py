"""LoRA files of every kind that ComfyUI has an adapter for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

RANK = 3
Shape = tuple[int, ...]


def _lora(out: int, width: int, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    return {"lora_up.weight": draw(out, RANK), "lora_down.weight": draw(RANK, width), "alpha": torch.tensor(2.0)}


def _dora(out: int, width: int, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    return _lora(out, width, draw) | {"dora_scale": 1 + draw(out, 1)}


def _dora_of_columns(out: int, width: int, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    return _lora(out, width, draw) | {"dora_scale": 1 + draw(1, width)}


def _loha(out: int, width: int, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    return {
        "hada_w1_a": 9 * draw(out, RANK),
        "hada_w1_b": draw(RANK, width),
        "hada_w2_a": 9 * draw(out, RANK),
        "hada_w2_b": draw(RANK, width),
        "alpha": torch.tensor(1.5),
    }


def _lokr(out: int, width: int, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    rows, columns = _divisor(out), _divisor(width)
    return {"lokr_w1": draw(rows, columns), "lokr_w2": draw(out // rows, width // columns)}


def _glora(out: int, width: int, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    return {
        "a1.weight": draw(width, RANK),
        "a2.weight": draw(RANK, width),
        "b1.weight": draw(out, RANK),
        "b2.weight": draw(RANK, width),
    }


def _oft(out: int, width: int, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    size = _divisor(out)
    return {"oft_blocks": 3 * draw(out // size, size, size), "alpha": torch.tensor(5.0)}


def _boft(out: int, width: int, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    return {"oft_blocks": 3 * draw(1, out // 2, 2, 2), "alpha": torch.tensor(5.0)}


def _diff(out: int, width: int, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    return {"diff": draw(out, width), "diff_b": draw(out)}


KINDS = {
    "lora": _lora,
    "dora": _dora,
    "dora of columns": _dora_of_columns,
    "loha": _loha,
    "lokr": _lokr,
    "glora": _glora,
    "oft": _oft,
    "boft": _boft,
    "diff": _diff,
}


def lora_for(shapes: Mapping[str, Shape], kinds: Iterable[str], seed: int, size: float = 0.08) -> dict[str, Tensor]:
    """A LoRA for every matrix of blocks among these weights, each of the next of `kinds`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return size * torch.randn(shape, generator=generator)

    kinds, made = tuple(kinds), {}
    matrices = [name for name, shape in shapes.items() if len(shape) == 2 and "blocks." in name and shape[0] % 2 == 0]
    for index, name in enumerate(sorted(matrices)):
        tensors = KINDS[kinds[index % len(kinds)]](*shapes[name], draw)
        layer = name.removesuffix(".weight")
        biased = f"{layer}.bias" in shapes
        made.update({f"{layer}.{key}": tensor for key, tensor in tensors.items() if biased or key != "diff_b"})
    return made


def _divisor(number: int) -> int:
    return next(divisor for divisor in (4, 3, 2, 1) if number % divisor == 0)
