"""The attention kernels that a person can choose by name.

The names are the members of yunchang's `AttnType`, which saved workflows hold, and AUTO.
"""

from __future__ import annotations

import functools
import logging

import torch

from . import torch_kernels
from .library import LIBRARIES, LibraryKernel, LibraryKernelWithLse, sage_has_lse
from .torch_kernels import NAMES as TORCH_NAMES
from .torch_kernels import TorchKernel

Kernel = TorchKernel | LibraryKernel

logger = logging.getLogger(__name__)

AUTO = "auto"
SPARSE = "SPARSE_SAGE"
NAMES = (AUTO, *TORCH_NAMES, *LIBRARIES, SPARSE)

# PyTorch's attention by compute capability. Measured on Hopper: cuDNN takes 0.6 of flash attention's time.
_PREFERRED = (
    ((9, 0), ("TORCH_CUDNN", "TORCH_FLASH")),
    ((8, 0), ("TORCH_FLASH", "TORCH_EFFICIENT")),
    ((0, 0), ("TORCH_EFFICIENT",)),
)
_TRIALS = (96, 128)  # tokens: blocks that are full, and one that is not
_LARGEST_ERROR = 0.05  # of values of size 1: far above rounding in half precision, far below a wrong result


def check_available(name: str, ring_degree: int = 1, device: torch.device | None = None) -> None:
    """Raises ValueError, saying what to install or what to choose, when `name` cannot be used here, or on `device`."""
    if name in (AUTO, *TORCH_NAMES):
        if name == "TORCH_CUDNN" and not torch.backends.cudnn.is_available():
            raise ValueError("XFuser_attention = TORCH_CUDNN needs an NVIDIA GPU with cuDNN: choose auto")
        return
    library = LIBRARIES.get(name)
    if library is None:
        reason = "needs parameters tuned for each layer of a model" if name == SPARSE else "is not known"
        raise ValueError(f"XFuser_attention = {name} {reason}: choose one of {', '.join((AUTO, *TORCH_NAMES))}")
    missing = library.missing()
    if missing:
        raise ValueError(f"XFuser_attention = {name}: {missing}; or choose auto")
    unsupported = None if device is None else library.unsupported(device)
    if unsupported:
        raise ValueError(f"XFuser_attention = {name} cannot run here: {unsupported}; choose auto")
    if ring_degree > 1 and not _has_lse(name):
        raise ValueError(
            f"XFuser_attention = {name} gives no log-sum-exp, so it cannot be used with ring_degree = {ring_degree}: "
            f"choose auto or one of the TORCH choices, or ring_degree = 1"
        )


@functools.cache
def kernel(name: str, device: torch.device | None = None) -> Kernel:
    """The kernel of that name on a device, the CPU where it is None.

    Raises ValueError as `check_available`, and where the device cannot run it or a trial call goes wrong.
    """
    device = device or torch.device("cpu")
    check_available(name, device=device)
    if name == AUTO:
        return _best(device)
    if name in TORCH_NAMES:
        return TorchKernel(name)
    chosen = (LibraryKernelWithLse if _has_lse(name) else LibraryKernel)(name, LIBRARIES[name])
    fault = _fault(chosen, device, torch.float16)
    if fault is not None:
        raise ValueError(f"XFuser_attention = {name} does not work here: {fault}; choose auto")
    return chosen


def _has_lse(name: str) -> bool:
    return LIBRARIES[name].has_lse and (LIBRARIES[name].module != "sageattention" or sage_has_lse())


def _best(device: torch.device) -> TorchKernel:
    """The fastest exact kernel that works on this device, by rule and not by timing: the same seed on the same GPU
    gives the same picture."""
    if device.type != "cuda":
        return TorchKernel("TORCH")
    capability = torch.cuda.get_device_capability(device)
    names = next(names for lowest, names in _PREFERRED if capability >= lowest)
    for name in names:
        reason = _fault(TorchKernel(name), device, torch.bfloat16 if capability >= (8, 0) else torch.float16)
        if reason is None:
            logger.info("attention: auto takes %s on %s", name, torch.cuda.get_device_name(device))
            return TorchKernel(name)
        logger.warning("attention: auto leaves out %s on %s: %s", name, torch.cuda.get_device_name(device), reason)
    return TorchKernel("TORCH")


def _fault(candidate: Kernel, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with a kernel on this device, by small calls with and without a log-sum-exp."""
    generator = torch.Generator(device).manual_seed(0)
    error = 0.0
    for tokens in _TRIALS:
        q, k, v = (torch.randn(1, 2, tokens, 64, generator=generator, device=device, dtype=dtype) for _ in range(3))
        expected, expected_total = torch_kernels.reference_attention(q.float(), k.float(), v.float(), None, None)
        try:
            pairs = [(candidate(q, k, v, None, None), expected)]
            if hasattr(candidate, "with_lse"):
                pairs += zip(candidate.with_lse(q, k, v, None, None), (expected, expected_total), strict=True)
        except (RuntimeError, ValueError, TypeError, AssertionError, ImportError) as failure:
            return f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
        error = max(error, *((mine.float() - true).abs().max().item() for mine, true in pairs))
    return None if error < _LARGEST_ERROR else f"it is off by {error:.2g}"
