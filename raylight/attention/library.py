"""Attention of optional libraries: what each needs, and how it is called.

flash-attn, FlashInfer and AITER are called through yunchang, which has one signature for all of them. SageAttention is
called directly, because yunchang passes its scale by a name that it ignores.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .torch_kernels import Partial, TorchKernel

# q, k, v (B, S, H, D) and a scale -> the output (B, S, H, D), and the log-sum-exp (B, H, S) in float32 or None.
Function = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor | None]]

Capability = tuple[int, int]

MANY_KEYS = 4096


@dataclass(frozen=True, slots=True)
class Library:
    """One choice of a library's attention.

    `capabilities`: the lowest and the highest CUDA compute capability (None: no upper bound). `head_sizes`: those that
    it supports. `attribute`: a function that older versions of the module lack. `key_block`: the number of keys is
    padded to a multiple of this, and the padding is not masked. `through`: the package that calls it, if any.
    """

    module: str
    install: str
    function: Callable[[], Function]
    capabilities: tuple[Capability, Capability | None] = ((8, 0), None)
    head_sizes: tuple[int, ...] | range = range(8, 257, 8)
    has_lse: bool = True
    attribute: str = ""
    rocm: bool = False
    key_block: Callable[[], int] = lambda: 1
    through: str = ""

    def missing(self) -> str | None:
        """Return why it cannot be used in this environment, or None. Imports `module` only to look up `attribute`."""
        if importlib.util.find_spec(self.module) is None:
            return f"the Python package {self.module} is not installed: {self.install}"
        if self.attribute and not hasattr(importlib.import_module(self.module), self.attribute):
            version = importlib.metadata.version(self.module)
            return f"{self.module} {version} is installed, which does not have it: {self.install}"
        if self.through and importlib.util.find_spec(self.through) is None:
            return (
                f"it is called through the Python package {self.through}, which is not installed: "
                f"run pip install --no-deps {self.through}"
            )
        return None

    def unsupported(self, device: torch.device) -> str | None:
        """Return why it does not run on this device, or None."""
        if device.type != "cuda":
            return "it needs a GPU"
        if self.rocm != (torch.version.hip is not None):
            return f"it needs an {'AMD' if self.rocm else 'NVIDIA'} GPU"
        if self.rocm:
            return None
        capability, (low, high) = torch.cuda.get_device_capability(device), self.capabilities
        if capability < low or (high is not None and capability > high):
            wanted = f"{low[0]}.{low[1]}" + (" or higher" if high is None else f" to {high[0]}.{high[1]}")
            return (
                f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, "
                f"and it needs {wanted}"
            )
        return None


class LibraryKernel:
    """A kernel that calls a library's attention.

    PyTorch does calls with a mask, which no library supports, and calls with few keys that do not fill the library's
    blocks, where its unmasked padding would matter. With many keys the padding matters less than rounding.
    """

    def __init__(self, name: str, library: Library) -> None:
        self.name, self._library = name, library
        self._function, self._key_block = library.function(), library.key_block()
        self._masked = TorchKernel("TORCH")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """Attend with q (B, H, Sq, D), k and v (B, HKV, Sk, D), all float16 or bfloat16, and mask (B|1, H|1, Sq|1, Sk).

        Return (B, H, Sq, D) of the same dtype.

        Raises ValueError: when the library does not support the dtype or head size.
        """
        if mask is not None or (k.shape[2] % self._key_block and k.shape[2] < MANY_KEYS):
            return self._masked(q, k, v, mask, scale)
        return self._run(q, k, v, scale)[0]

    def _run(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor | None]:
        width = q.shape[-1]
        if q.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"XFuser_attention = {self.name} computes in float16 or bfloat16, and this model in "
                f"{str(q.dtype).removeprefix('torch.')}: choose auto or one of the TORCH choices"
            )
        if width not in self._library.head_sizes:
            raise ValueError(
                f"XFuser_attention = {self.name} does not take attention heads of size {width}, which "
                f"this model has: choose auto or one of the TORCH choices"
            )
        # Not every library supports grouped queries. (B, HKV, Sk, D) -> (B, H, Sk, D)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))  # (B, H, S, D) -> (B, S, H, D)
        out, lse = self._function(q, k, v, width**-0.5 if scale is None else scale)
        return out.transpose(1, 2), lse


class LibraryKernelWithLse(LibraryKernel):
    """A library kernel whose log-sum-exp is true, so that partial attention can be merged."""

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Partial:
        """As `__call__`. Return the output, and the lse (B, H, Sq), float32, of the scores."""
        if mask is not None:
            return self._masked.with_lse(q, k, v, mask, scale)
        out, lse = self._run(q, k, v, scale)
        assert lse is not None, "a library that returns no lse has the class without it"
        return out, lse


def _yunchang(member: str, batched: bool = True) -> Callable[[], Function]:
    def function() -> Function:
        from yunchang.kernels import AttnType, select_flash_attn_impl

        forward = cast("Callable[..., Partial]", select_flash_attn_impl(AttnType[member], stage="fwd-only"))

        def call(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
            return forward(
                q,
                k,
                v,
                dropout_p=0.0,
                softmax_scale=scale,
                causal=False,
                window_size=(-1, -1),
                softcap=0.0,
                alibi_slopes=None,
                return_softmax=False,
            )

        if batched:
            return call

        def one_by_one(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
            results = [call(q[i : i + 1], k[i : i + 1], v[i : i + 1], scale) for i in range(q.shape[0])]
            outs, lses = zip(*results, strict=True)
            return torch.cat(outs), torch.cat(lses)

        return one_by_one

    return function


def _sage(name: str, **options: Any) -> Callable[[], Function]:
    def function() -> Function:
        sageattention = importlib.import_module("sageattention")
        attention = getattr(sageattention, name, None) or sageattention.sageattn
        returns_lse = sage_has_lse()

        def call(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
            if returns_lse:
                return attention(q, k, v, tensor_layout="NHD", sm_scale=scale, return_lse=True, **options)
            # Version 1 subtracts the mean of the keys in place.
            return attention(q, k.clone(), v, tensor_layout="NHD", sm_scale=scale), None

        return call

    return function


def sage_has_lse() -> bool:
    """Return whether the installed SageAttention has a log-sum-exp: version 2 has, 1 has not."""
    try:
        return int(importlib.metadata.version("sageattention").split(".")[0]) >= 2
    except importlib.metadata.PackageNotFoundError:
        return False


def _sage_key_block() -> int:
    """Return the block to which SageAttention pads keys without masking them, as version 1 does."""
    return 1 if sage_has_lse() else 64


_SAGE_2 = "install SageAttention 2 (https://github.com/thu-ml/SageAttention)"
_SAGE_SIZES = (64, 96, 128)

YUNCHANG = "yunchang"

LIBRARIES = {
    "AITER": Library("aiter", "see https://github.com/ROCm/aiter", _yunchang("AITER"), rocm=True, through=YUNCHANG),
    "FA": Library("flash_attn", "run pip install flash-attn --no-build-isolation", _yunchang("FA"), through=YUNCHANG),
    "FA3": Library(
        "flash_attn_interface",
        "see FlashAttention-3 at https://github.com/Dao-AILab/flash-attention",
        _yunchang("FA3"),
        capabilities=((9, 0), (9, 0)),
        through=YUNCHANG,
    ),
    "FLASHINFER": Library(
        "flashinfer",
        "run pip install flashinfer-python",
        _yunchang("FLASHINFER", batched=False),
        head_sizes=(64, 128, 256),
        through=YUNCHANG,
    ),
    "SAGE_AUTO": Library(
        "sageattention",
        "run pip install sageattention",
        _sage("sageattn"),
        head_sizes=_SAGE_SIZES,
        key_block=_sage_key_block,
    ),
    "SAGE_FP16": Library(
        "sageattention",
        _SAGE_2,
        _sage("sageattn_qk_int8_pv_fp16_cuda", pv_accum_dtype="fp32"),
        head_sizes=_SAGE_SIZES,
        attribute="sageattn_qk_int8_pv_fp16_cuda",
    ),
    # The only one of version 1, where it is named sageattn.
    "SAGE_FP16_TRITON": Library(
        "sageattention",
        "run pip install sageattention",
        _sage("sageattn_qk_int8_pv_fp16_triton"),
        head_sizes=_SAGE_SIZES,
        key_block=_sage_key_block,
    ),
    "SAGE_FP8": Library(
        "sageattention",
        _SAGE_2,
        _sage("sageattn_qk_int8_pv_fp8_cuda", pv_accum_dtype="fp32+fp32"),
        capabilities=((8, 9), None),
        head_sizes=_SAGE_SIZES,
        attribute="sageattn_qk_int8_pv_fp8_cuda",
    ),
    "SAGE_FP8_SM90": Library(
        "sageattention",
        _SAGE_2,
        _sage("sageattn_qk_int8_pv_fp8_cuda_sm90", pv_accum_dtype="fp32+fp32"),
        capabilities=((9, 0), (9, 0)),
        head_sizes=_SAGE_SIZES,
        attribute="sageattn_qk_int8_pv_fp8_cuda_sm90",
    ),
}
