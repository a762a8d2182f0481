"""The attention kernels that a user can choose by name.

The names are the members of yunchang's `AttnType`, which saved workflows hold, AUTO, and libraries that came later.
"""

from __future__ import annotations

import functools
import logging

import torch

from . import torch_kernels
from .library import LIBRARIES, LibraryKernel, LibraryKernelWithLse
from .library_functions import sage_has_lse
from .torch_kernels import NAMES as TORCH_NAMES
from .torch_kernels import TorchKernel

NamedKernel = TorchKernel | LibraryKernel

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
_TEST_TOKENS = (96, 128)  # full blocks, and one that is not
_LARGEST_ERROR = 0.05  # of values of size 1: far above rounding in half precision, far below a wrong result


def check_kernel(name: str, ring_degree: int = 1, device: torch.device | None = None) -> None:
    """Check whether the kernel `name` can be used here, with a ring of this degree, and on `device` if one is given.

    Raises ValueError: when it cannot; the message says what to install or choose.
    """
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
    if ring_degree > 1 and not has_lse(name):
        raise ValueError(
            f"XFuser_attention = {name} gives no log-sum-exp, so it cannot be used with ring_degree = {ring_degree}: "
            f"choose auto or one of the TORCH choices, or ring_degree = 1"
        )


@functools.cache
def kernel(name: str, device: torch.device | None = None) -> NamedKernel:
    """Return the kernel `name` for `device`, or for the CPU if it is None.

    Raises ValueError: as `check_kernel`, and when the device cannot run the kernel or its self-test fails.
    """
    device = device or torch.device("cpu")
    check_kernel(name, device=device)
    if name == AUTO:
        return _best(device)
    if name in TORCH_NAMES:
        return TorchKernel(name)
    chosen = (LibraryKernelWithLse if has_lse(name) else LibraryKernel)(name, LIBRARIES[name])
    failure = _self_test(chosen, device, torch.float16, LIBRARIES[name].largest_error)
    if failure is not None:
        raise ValueError(f"XFuser_attention = {name} does not work here: {failure}; choose auto")
    return chosen


def has_lse(name: str) -> bool:
    """Return whether a kernel returns a log-sum-exp, which a ring needs. The library of one that is none of PyTorch's
    must be there.
    """
    if name in (AUTO, *TORCH_NAMES):
        return True
    return LIBRARIES[name].has_lse and (LIBRARIES[name].module != "sageattention" or sage_has_lse())


def _best(device: torch.device) -> TorchKernel:
    """Return the fastest exact kernel that works on this device, by rule and not by timing, so that the same seed on
    the same GPU gives the same image.
    """
    if device.type != "cuda":
        return TorchKernel("TORCH")
    capability = torch.cuda.get_device_capability(device)
    names = next(names for lowest, names in _PREFERRED if capability >= lowest)
    for name in names:
        failure = _self_test(TorchKernel(name), device, torch.bfloat16 if capability >= (8, 0) else torch.float16)
        if failure is None:
            logger.info("attention: auto uses %s on %s", name, torch.cuda.get_device_name(device))
            return TorchKernel(name)
        logger.warning("attention: auto skips %s on %s: %s", name, torch.cuda.get_device_name(device), failure)
    return TorchKernel("TORCH")


def _self_test(
    candidate: NamedKernel, device: torch.device, dtype: torch.dtype, largest_error: float = _LARGEST_ERROR
) -> str | None:
    """Compare small calls of a kernel, with and without a log-sum-exp, with the reference. Return what is wrong, or
    None.
    """
    generator = torch.Generator(device).manual_seed(0)
    error = 0.0
    for tokens in _TEST_TOKENS:
        q, k, v = (torch.randn(1, 2, tokens, 64, generator=generator, device=device, dtype=dtype) for _ in range(3))
        expected, expected_lse = torch_kernels.reference_attention(q.float(), k.float(), v.float(), None, None)
        try:
            pairs = [(candidate(q, k, v, None, None), expected)]
            if (with_lse := getattr(candidate, "with_lse", None)) is not None:
                pairs += zip(with_lse(q, k, v, None, None), (expected, expected_lse), strict=True)
        except (RuntimeError, ValueError, TypeError, AssertionError, ImportError) as failure:
            return f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
        error = max(error, *((actual.float() - true).abs().max().item() for actual, true in pairs))
    return None if error < largest_error else f"its error is {error:.2g}"
