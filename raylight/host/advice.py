"""What a person can do about workers that failed, given how they were set up."""

from __future__ import annotations

from raylight.cluster.config import SessionConfig
from raylight.cluster.errors import DIED, HUNG, OUT_OF_MEMORY, WorkerError

from .recipe import OFFLOADED, SHARDED, WHOLE

_ANEW = "The workers start anew with the next prompt"


def advised(error: WorkerError, config: SessionConfig, sharding: str | None) -> WorkerError:
    """The same error with what to try."""
    if error.kind == OUT_OF_MEMORY:
        advice = f"What helps, in this order: {'; '.join(_for_memory(config, sharding))}. {_ANEW}."
    elif error.kind == DIED:
        advice = (f"{_ANEW}. If it happens again, the system's memory may be too small: "
                  f"{'; '.join(_for_memory(config, sharding))}.")
    elif error.kind == HUNG:
        advice = (f"{_ANEW}. If it happens again on GPUs, start ComfyUI with NCCL_P2P_DISABLE=1; NCCL_DEBUG=INFO shows "
                  f"what NCCL does.")
    else:
        advice = f"{_ANEW}."
    told = WorkerError(f"{error}\n{advice}", error.kind)
    told.__cause__ = error.__cause__
    return told


def _for_memory(config: SessionConfig, sharding: str | None) -> list[str]:
    several = config.world_size > 1
    remedies = []
    if sharding == WHOLE and several:
        remedies.append("switch FSDP on, so that each GPU holds a part of the weights only")
    if sharding == SHARDED:
        remedies.append("switch FSDP_CPU_OFFLOAD on, so that weights stay in system memory")
    if sharding == OFFLOADED:
        remedies.append("close what else takes GPU or system memory")
    if config.mesh.batch > 1:
        remedies.append("lower cfg_degree or dp_degree and raise ulysses_degree, so that more GPUs share the tokens of "
                        "one image or video")
    remedies.append("a smaller size, fewer frames or a smaller batch")
    remedies.append("a file with smaller weights (fp8, GGUF)")
    return remedies
