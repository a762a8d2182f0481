"""The strategies that a user can choose by name: ours, ours in 8 bits, and the long-context attention of yunchang and
of xfuser.

The libraries need equal numbers of tokens and heads on all ranks, and no mask; ours does the other calls. yunchang's
ring uses zeros for the log-sum-exp of two of PyTorch's kernels, which is wrong: these are refused with a ring.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from raylight.attention.kernels import AUTO

from .sequence_attention import Kernel, Strategy

logger = logging.getLogger(__name__)

OURS, YUNCHANG, XFUSER = "raylight", "yunchang", "xfuser"
OURS_INT8 = "raylight_int8"  # half the bytes, not the same result: never chosen but by the user
NAMES = (OURS, YUNCHANG, XFUSER, OURS_INT8)

# Both depend on torch, which pip may replace to satisfy them.
_YUNCHANG_INSTALL = "run pip install --no-deps yunchang"
_INSTALL = {
    YUNCHANG: {YUNCHANG: _YUNCHANG_INSTALL},
    XFUSER: {
        XFUSER: "install it as docs/compatibility.md of Raylight says, so that torch stays as it is",
        YUNCHANG: _YUNCHANG_INSTALL,
    },
}

_KERNELS = ("TORCH", "TORCH_FLASH", "TORCH_EFFICIENT", "TORCH_CUDNN", "FA", "FA3")
_NO_RING = ("TORCH", "TORCH_CUDNN")


def is_ours(name: str) -> bool:
    """Return whether a strategy is Raylight's own, which works with every kernel, mask and size, and in a ring."""
    return name in (OURS, OURS_INT8)


def check_strategy(name: str, kernel: str, ring_degree: int, has_gpu: bool) -> None:
    """Check whether the strategy `name` can be used here, with this kernel and a ring of this degree.

    Raises ValueError: when it cannot; the message says what to install or choose.
    """
    if is_ours(name):
        return
    if name not in NAMES:
        raise ValueError(f"sequence_attention = {name} is not known: choose one of {', '.join(NAMES)}")
    for package, install in _INSTALL[name].items():
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"sequence_attention = {name} needs the Python package {package}: {install}, or choose {OURS}"
            )
    if name == XFUSER and not has_gpu:
        raise ValueError(f"sequence_attention = {XFUSER} needs a GPU: choose {OURS}")
    if kernel not in (AUTO, *_KERNELS):
        raise ValueError(
            f"sequence_attention = {name} cannot be used with XFuser_attention = {kernel}, to which it does not pass "
            f"the scale: choose one of {', '.join(_KERNELS)}, or sequence_attention = {OURS}"
        )
    if ring_degree > 1 and (kernel in (AUTO, *_NO_RING) or not has_gpu):
        raise ValueError(
            f"sequence_attention = {name} has no true log-sum-exp with XFuser_attention = {kernel}, so its ring would "
            f"be wrong: choose TORCH_FLASH on a GPU, ring_degree = 1, or sequence_attention = {OURS}"
        )


class ExternalAttention:
    """A strategy that calls a library's attention, and `ours` for calls that the library does not support.

    `calls` counts the library's.
    """

    def __init__(self, name: str, ulysses: dist.ProcessGroup, ring: dist.ProcessGroup, ours: Strategy) -> None:
        """Prepare for these groups. `name` is YUNCHANG or XFUSER.

        Raises ImportError: when the library, or one that it needs, is missing.
        """
        import yunchang.globals

        self._process_group = cast("Any", yunchang.globals.PROCESS_GROUP)
        self._groups = ulysses, ring
        self._name, self._ours = name, ours
        self._ulysses = dist.get_world_size(ulysses)
        self._ranks = self._ulysses * dist.get_world_size(ring)
        self._layers: dict[str, Callable[..., Tensor]] = {}
        self._logged: set[str] = set()
        self.calls = 0

    def __call__(
        self,
        kernel: Kernel,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int],
        mask: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        """As `Strategy`."""
        name = getattr(kernel, "name", "")
        reason = self._unsupported(name, q, k, v, lengths, mask)
        if reason is not None:
            if reason not in self._logged:
                self._logged.add(reason)
                logger.info("attention: %s does not support %s; raylight does these calls", self._name, reason)
            return self._ours(kernel, q, k, v, lengths, mask, scale)
        self.calls += 1
        attention = self._layer(name, q.device)
        # (B, H, S_LOCAL, D) -> (B, S_LOCAL, H, D)
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
        out = attention(q, k, v, softmax_scale=q.shape[-1] ** -0.5 if scale is None else scale)
        return out.transpose(1, 2)

    def _unsupported(
        self, kernel: str, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], mask: Tensor | None
    ) -> str | None:
        """Return what the library does not support of a call, or None."""
        if kernel not in _KERNELS:
            return "this kernel"
        if mask is not None:
            return "masks"
        if len(set(lengths)) > 1:
            return f"{sum(lengths)} tokens on {self._ranks} ranks"
        if q.shape[1] % self._ulysses:
            return f"{q.shape[1]} heads with a Ulysses degree of {self._ulysses}"
        return "grouped queries" if k.shape[1] != q.shape[1] or v.shape[3] != q.shape[3] else None

    def _layer(self, kernel: str, device: torch.device) -> Callable[..., Tensor]:
        from yunchang.kernels import AttnType

        # Its other kernels of PyTorch fail on a CPU.
        chosen = "TORCH_MATH" if kernel == "TORCH" or device.type == "cpu" else kernel
        if chosen not in self._layers:
            # Of the whole process; a layer keeps those that it finds when it is made.
            self._process_group.ULYSSES_PG, self._process_group.RING_PG = self._groups
            if self._name == YUNCHANG:
                from yunchang import LongContextAttention

                self._layers[chosen] = LongContextAttention(attn_type=AttnType[chosen])
            else:
                from xfuser.core.long_ctx_attention import xFuserLongContextAttention

                layer = xFuserLongContextAttention(attn_type=AttnType[chosen])
                self._layers[chosen] = lambda *tensors, **options: layer(None, *tensors, **options)
        return self._layers[chosen]
