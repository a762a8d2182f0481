"""Attention of optional libraries: what each needs, and the kernels that call it.

How each is called is in `library_functions`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import library_functions
from .library_functions import Function, sage, sage_key_block, through_yunchang
from .torch_kernels import Partial, TorchKernel

Capability = tuple[int, int]

MANY_KEYS = 4096


@dataclass(frozen=True, slots=True)
class Library:
    """One choice of a library's attention.

    `capabilities`: the lowest and the highest CUDA compute capability (None: no upper bound). `head_sizes`: those that
    it supports. `attribute`: a function that older versions of the module lack. `key_block`: the number of keys is
    padded to a multiple of this, and the padding is not masked. `through`: the package that calls it, if any.
    `largest_error`: of values of size 1 in the self-test: far above its rounding, far below a wrong result. `rocm`:
    whether it needs an AMD GPU, None if it has kernels for both kinds and says itself which GPUs it lacks. `yields`:
    it leaves calls that a model wants in full precision to PyTorch, as ComfyUI does with the same library.
    """

    module: str
    install: str
    function: Callable[[], Function]
    capabilities: tuple[Capability, Capability | None] = ((8, 0), None)
    head_sizes: tuple[int, ...] | range = range(8, 257, 8)
    has_lse: bool = True
    attribute: str = ""
    rocm: bool | None = False
    key_block: Callable[[], int] = lambda: 1
    through: str = ""
    largest_error: float = 0.05
    yields: bool = False

    def missing(self) -> str | None:
        """Return why it cannot be used in this environment, or None. Imports `module` only to look up `attribute`."""
        if not _is_installed(self.module):
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
        on_rocm = torch.version.hip is not None
        if self.rocm not in (None, on_rocm):
            return f"it needs an {'AMD' if self.rocm else 'NVIDIA'} GPU"
        if on_rocm:
            return None
        capability, (low, high) = torch.cuda.get_device_capability(device), self.capabilities
        if capability < low or (high is not None and capability > high):
            wanted = f"{low[0]}.{low[1]}" + (" or higher" if high is None else f" to {high[0]}.{high[1]}")
            return (
                f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, "
                f"and it needs {wanted}"
            )
        return None


def _is_installed(module: str) -> bool:
    """Return whether a module can be found, also one in a package that is not there."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


class LibraryKernel:
    """A kernel that calls a library's attention.

    PyTorch does calls with a mask, which no library supports, and calls with few keys that do not fill the library's
    blocks, where its unmasked padding would matter. With many keys the padding matters less than rounding.
    """

    def __init__(self, name: str, library: Library) -> None:
        """Look up the library's function.

        Raises ValueError: when importing it fails, because another package that it needs is missing, say.
        """
        self.name, self._library = name, library
        try:
            self._function, self._key_block = library.function(), library.key_block()
        except (ImportError, OSError) as error:  # OSError: a library of CUDA that cannot be loaded
            reason = f"{library.module} cannot be imported: {error}"
            raise ValueError(f"XFuser_attention = {name}: {reason}; {library.install}, or choose auto") from error
        self._masked = TorchKernel("TORCH")

    @property
    def precise(self) -> LibraryKernel | TorchKernel:
        """The kernel for calls that a model wants in full precision."""
        return self._masked if self._library.yields else self

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


_SAGE_2 = "install SageAttention 2 (https://github.com/thu-ml/SageAttention)"
_SAGE_3 = "install SageAttention 3 (https://github.com/thu-ml/SageAttention, folder sageattention3_blackwell)"
_SAGE_SIZES = (64, 96, 128)

YUNCHANG = "yunchang"

LIBRARIES = {
    "AITER": Library(
        "aiter", "see https://github.com/ROCm/aiter", through_yunchang("AITER"), rocm=True, through=YUNCHANG
    ),
    # The name by which ComfyUI registers it.
    "COMFY_KITCHEN_INT8": Library(
        "comfy_kitchen",
        "run pip install --upgrade 'comfy-kitchen>=0.2.31'",
        library_functions.comfy_kitchen_int8,
        capabilities=((7, 5), None),
        has_lse=False,
        attribute="int8_attention",
        rocm=None,
    ),
    "FA": Library(
        "flash_attn.flash_attn_interface",
        "run pip install flash-attn --no-build-isolation",
        library_functions.flash_attention_2,
    ),
    "FA3": Library(
        "flash_attn_interface",
        "see FlashAttention-3 at https://github.com/Dao-AILab/flash-attention",
        through_yunchang("FA3"),
        capabilities=((9, 0), (9, 0)),
        through=YUNCHANG,
    ),
    "FA4": Library(
        "flash_attn.cute",
        "run pip install flash-attn-4",
        library_functions.flash_attention_4,
        head_sizes=range(8, 129, 8),
    ),
    "FLASHINFER": Library(
        "flashinfer", "run pip install flashinfer-python", library_functions.flashinfer, head_sizes=(64, 128, 256)
    ),
    "SAGE_AUTO": Library(
        "sageattention",
        "run pip install sageattention",
        sage("sageattn"),
        head_sizes=_SAGE_SIZES,
        key_block=sage_key_block,
        yields=True,
    ),
    "SAGE_FP16": Library(
        "sageattention",
        _SAGE_2,
        sage("sageattn_qk_int8_pv_fp16_cuda", pv_accum_dtype="fp32"),
        head_sizes=_SAGE_SIZES,
        attribute="sageattn_qk_int8_pv_fp16_cuda",
        yields=True,
    ),
    # The only one of version 1, where it is named sageattn.
    "SAGE_FP16_TRITON": Library(
        "sageattention",
        "run pip install sageattention",
        sage("sageattn_qk_int8_pv_fp16_triton"),
        head_sizes=_SAGE_SIZES,
        key_block=sage_key_block,
        yields=True,
    ),
    "SAGE_FP8": Library(
        "sageattention",
        _SAGE_2,
        sage("sageattn_qk_int8_pv_fp8_cuda", pv_accum_dtype="fp32+fp32"),
        capabilities=((8, 9), None),
        head_sizes=_SAGE_SIZES,
        attribute="sageattn_qk_int8_pv_fp8_cuda",
        yields=True,
    ),
    "SAGE_FP8_SM90": Library(
        "sageattention",
        _SAGE_2,
        sage("sageattn_qk_int8_pv_fp8_cuda_sm90", pv_accum_dtype="fp32+fp32"),
        capabilities=((9, 0), (9, 0)),
        head_sizes=_SAGE_SIZES,
        attribute="sageattn_qk_int8_pv_fp8_cuda_sm90",
        yields=True,
    ),
    "SAGE3": Library(
        "sageattn3",
        _SAGE_3,
        library_functions.sage_3,
        capabilities=((10, 0), None),
        head_sizes=(64, 128),
        has_lse=False,
        largest_error=0.4,
        yields=True,
    ),
}
