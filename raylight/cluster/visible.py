"""Which GPUs a process sees, by the environment variables of CUDA and of ROCm.

ROCm's PyTorch takes HIP_VISIBLE_DEVICES, or CUDA_VISIBLE_DEVICES where that is not set. ROCR_VISIBLE_DEVICES comes
before both: their numbers count what it leaves.
"""

from __future__ import annotations

from collections.abc import Mapping

CUDA, HIP, ROCR = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"
# Ray's switches for leaving them as they are.
_NOSET = {name: f"RAY_EXPERIMENTAL_NOSET_{name}" for name in (CUDA, HIP)}


def names(environ: Mapping[str, str], is_rocm: bool) -> list[str] | None:
    """What the GPUs that a process sees are called, in its order: indices, UUIDs or MIG names. None where its
    environment leaves all of them."""
    value = (environ.get(HIP) if is_rocm else None) or environ.get(CUDA)
    return [name.strip() for name in value.split(",")] if value else None


def of_machine(environ: Mapping[str, str], is_rocm: bool) -> int | None:
    """The machine's index of the first GPU that a process sees; None where it is called otherwise."""
    name = (names(environ, is_rocm) or ["0"])[0]
    if is_rocm and name.isdigit() and environ.get(ROCR):
        left = environ[ROCR].split(",")
        name = left[int(name)].strip() if int(name) < len(left) else ""
    return int(name) if name.isdigit() else None


def only(index: int, environ: Mapping[str, str], is_rocm: bool) -> dict[str, str]:
    """Variables by which a process sees one GPU, the `index`th that this one sees, whatever Ray would choose."""
    seen = names(environ, is_rocm)
    name = str(index) if seen is None else seen[index]
    return {variable: value for of_kind in ((CUDA, HIP) if is_rocm else (CUDA,))
            for variable, value in ((of_kind, name), (_NOSET[of_kind], "1"))}


def for_ray(environ: Mapping[str, str], is_rocm: bool) -> dict[str, str]:
    """Variables without which Ray refuses to start on ROCm: with ROCR_VISIBLE_DEVICES it wants HIP_VISIBLE_DEVICES, and
    gets what that is anyway."""
    if not is_rocm or HIP in environ or ROCR not in environ:
        return {}
    left = [name for name in environ[ROCR].split(",") if name.strip()]
    return {HIP: environ.get(CUDA) or ",".join(str(index) for index in range(len(left)))}
