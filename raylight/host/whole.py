"""A model that each rank has whole, behind ComfyUI's patcher."""

from __future__ import annotations

import torch

from raylight.sharding.joined import JoinedRows

from .gguf_patcher import GgufPatcher
from .mapped import MappedModel, set_parameter
from .patcher import RankPatcher


def whole(mapped: MappedModel, offload_device: torch.device) -> tuple[RankPatcher, int]:
    """A patcher of all the weights of a mapped model. Those that are to have another dtype than in the file become a
    copy of this rank's own, of so many bytes, and so do those that the file has in several tensors."""
    diffusion_model = mapped.model.diffusion_model
    own_bytes = 0
    for name, parameter in list(diffusion_model.named_parameters()):
        if mapped.ggml is not None and mapped.ggml.is_quantised(parameter):
            continue
        dtype = mapped.dtypes.get(name, parameter.dtype)
        if isinstance(parameter, JoinedRows) or parameter.dtype != dtype:
            own = parameter.detach()[...].to(dtype)
            own_bytes += own.nbytes
            set_parameter(diffusion_model, name, own)
    if mapped.ggml is None:
        patcher = RankPatcher(mapped.model, mapped.load_device, offload_device)
    else:
        patcher = GgufPatcher(mapped.model, mapped.load_device, offload_device)
        patcher.ggml = mapped.ggml
    patcher.mapped = {f"diffusion_model.{name}": patcher.in_file(parameter.detach())
                      for name, parameter in diffusion_model.named_parameters()}
    patcher.back_up()
    return patcher, own_bytes
