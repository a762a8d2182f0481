"""What ComfyUI has beside a worker on one GPU: a text encoder of 10 GB, a VAE, and a GPU that is as full as wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management
import comfy.ops
import comfy.sd
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.model_patcher import ModelPatcher
from gpu_cases import GPUS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raylight.cluster import active_session
from raylight.dev.demo.tiny import write_checkpoint
from raylight.host.jobs import HeldModel
from raylight.host.worker_service import WorkerService

WIDTH, LAYERS = 4096, 300
# Of AutoencoderKL, as Stable Diffusion has it.
_VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def wide_wan(folder: Path) -> Path:
    """A Wan of 1.3 GB in float16, in which ComfyUI computes it too. Its matrices are so large that each has memory of
    its own, which PyTorch can give back.
    """
    path = folder / "wan-wide.safetensors"
    if not path.exists():
        write_checkpoint(path, "wan-t2v", heads=-(-24 // max(1, GPUS)) * max(1, GPUS), layers=5)
        save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    return path


class Encoder:
    """A text encoder as far as memory goes: layers of ComfyUI, float16, on the CPU until it encodes."""

    def __init__(self, device: torch.device, width: int = WIDTH, layers: int = LAYERS) -> None:
        generator = torch.Generator(device).manual_seed(0)
        made = []
        for _ in range(layers):
            layer = comfy.ops.manual_cast.Linear(width, width, bias=False, dtype=torch.float16, device="cpu")
            weight = torch.randn(width, width, dtype=torch.float16, device=device, generator=generator)
            layer.weight = nn.Parameter((weight * width**-0.5).cpu(), requires_grad=False)
            made.append(layer)
        self.patcher = ModelPatcher(nn.Sequential(*made), device, torch.device("cpu"))
        self._tokens = torch.randn(77, width, dtype=torch.float16, device=device, generator=generator)

    def encode(self) -> Tensor:
        """Load the encoder as ComfyUI loads one, and return (77, width) float16 on the CPU."""
        comfy.model_management.load_models_gpu([self.patcher])
        hidden = self._tokens
        for layer in self.patcher.model:
            hidden = nn.functional.rms_norm(layer(hidden), hidden.shape[-1:])
        return hidden.cpu()

    @property
    def room(self) -> int:
        """The bytes that ComfyUI wants to have free to load all of the encoder."""
        return int(1.1 * self.patcher.model_size() + comfy.model_management.minimum_inference_memory())


def vae() -> comfy.sd.VAE:
    """A VAE with random weights, by which an image has all values."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in AutoencoderKL(ddconfig=_VAE, embed_dim=4).state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        is_gain = tensor.ndim == 1 and name.endswith("weight")
        tensors[name] = noise * tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.1 * noise + float(is_gain)
    return comfy.sd.VAE(sd=tensors, config={"params": {"ddconfig": _VAE, "embed_dim": 4}})


def held() -> dict[int, int]:
    """The bytes of weights that each rank has on its GPU."""
    return _of_models(lambda model: model.device_bytes)


def kept() -> dict[int, int]:
    """The bytes of weights that stay gathered on each rank's GPU."""
    return _of_models(lambda model: model.kept_bytes)


def _of_models(count: Callable[[HeldModel], int]) -> dict[int, int]:
    answers = active_session.running().run_all(WorkerService.memory)
    return {rank: sum(map(count, answer.models)) for rank, answer in answers.items()}


@contextmanager
def left_free(nbytes: int) -> Iterator[None]:
    """Within it so many bytes of ComfyUI's GPU are free, and what else is there stays as it is."""
    device = comfy.model_management.get_torch_device()
    comfy.model_management.soft_empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    assert free > nbytes, "the GPU is too small or too full for this test"
    ballast = torch.empty(free - nbytes, dtype=torch.uint8, device=device)
    try:
        yield
    finally:
        del ballast
        torch.cuda.empty_cache()
