"""Messages between ComfyUI's process and the workers: jobs of one run or one forward, and their results."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from raylight.cluster.object_store import ObjectHandle
from raylight.cluster.serialization import SerializedObject
from raylight.cluster.tensor_delta import Message
from raylight.parallel.graphs import AUTO

from . import torch_settings
from .recipe import ModelRecipe

KEY = "raylight"  # of Raylight's wrappers and callbacks on a patcher
# Methods of a diffusion model, with weights, that ComfyUI calls outside of its forward (LTX-2, Anima, MiniMax).
METHODS = ("preprocess_text_embeds",)


@dataclass(frozen=True, slots=True)
class Inside:
    """What nodes' code inside a diffusion model needs. `full_tokens_for` names the node whose code needs the full
    tokens, "" if none does; `watched` are paths of modules, from the diffusion model, that must not be called with
    sharded tokens; `by_token` are paths of modules that must treat each token on its own.
    """

    full_tokens_for: str = ""
    watched: tuple[str, ...] = ()
    by_token: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelJob:
    """The model that a job is for. `patches` are patches of weights by nodes besides the LoRAs of the recipe: a
    SerializedObject by ComfyUI's `patches_uuid`, fetched by a worker that does not have them applied. `inside` is what
    code of nodes inside of it needs. `graphs` is one of `parallel.graphs.NAMES`. `settings` are those of PyTorch in
    ComfyUI's process, for workers on devices of its type, `device_type`. Workers that `may_keep` gathered weights on
    their GPUs do so as far as memory allows.
    """

    recipe: ModelRecipe
    attention: str
    strategy: str
    patches: ObjectHandle | None = None
    inside: Inside = Inside()
    graphs: str = AUTO
    settings: torch_settings.Settings = ()
    device_type: str = ""
    may_keep: bool = True


@dataclass(frozen=True, slots=True)
class RandomState:
    """States of the global generators, uint8: the CPU's, and the GPU's if there is one."""

    cpu: Tensor
    cuda: Tensor | None = None


@dataclass(frozen=True, slots=True)
class RunJob:
    """A run: a guider, a sampler, and what ComfyUI's `outer_sample` takes, serialized by `pickling.serialize`.

    `latent_shape` is that of the noise. Samplers that draw noise from the global generators start from `random`, as
    they would in ComfyUI's process. `every_step` asks for the full x0 and x after every step; else rank 0 sends what a
    previewer needs if `wants_preview`, and the full x0 and x of the last step if `wants_last`. ComfyUI's previewers
    need the first frame of the first image; with `whole_preview` it is all of them.
    """

    model: ModelJob
    content: SerializedObject
    latent_shape: tuple[int, ...]
    random: RandomState
    free_memory_after: bool
    wants_preview: bool
    every_step: bool
    wants_last: bool
    whole_preview: bool = False


class AsSent(Enum):
    """Stands for a value in `ForwardJob.call` that is as in `extras`."""

    AS_SENT = "as sent"


AS_SENT = AsSent.AS_SENT


@dataclass(frozen=True, slots=True)
class ForwardJob:
    """One call of a method of the diffusion model. `call` has its arguments, whose tensors are in `tensors`, a latent
    of `latent_shape` first if there is one, and what nodes have set on the model and in its options: `extras`, a
    SerializedObject, has what is sent once in a run. The first call of a run has `begins_run`. Where code of nodes runs
    inside the model, which may draw noise from the global generators, `random` is their state in ComfyUI's process; the
    answer has the one after the call.
    """

    model: ModelJob
    method: str
    call: SerializedObject
    tensors: Message
    extras: ObjectHandle
    latent_shape: tuple[int, ...] | None = None
    begins_run: bool = False
    random: RandomState | None = None


@dataclass(frozen=True, slots=True)
class NeedsBytes:
    """Refusal of a request, by all ranks, because GPU memory is short on at least one. This rank's GPU lacks `missing`
    bytes, 0 if none. Models other than that of the request hold `movable` bytes there, which the rank can move away.
    """

    missing: int
    movable: int = 0


@dataclass(frozen=True, slots=True)
class GivenBack:
    """What a rank has given back of its GPU: `freed` bytes. Its weights still take `held` bytes of the GPU that
    `gpu_identity` calls `gpu`, "" on the CPU.
    """

    freed: int
    held: int
    gpu: str


@dataclass(frozen=True, slots=True)
class StepDone:
    """Step `step` (from 0) of `total` has ended. `x0` and `x`, (B, C, [T,] H, W) or packed, are as ComfyUI gives them
    to a callback, on the CPU; or `x0` is the first frame of the first image, (1, C, [1,] H, W) float32, and `x` None;
    or both are None.
    """

    step: int
    total: int
    x0: Tensor | None
    x: Tensor | None


@dataclass(frozen=True, slots=True)
class DegreesChosen:
    """The workers have chosen degrees for the forwards of a run; `text` has them all, and why."""

    text: str


@dataclass(frozen=True, slots=True)
class ExchangeTold:
    """What the workers say of how they exchange tokens in a run, where that is not exact."""

    text: str


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Rank 0 has read `done_bytes` of the `total_bytes` that it reads of the weights of the model `name`. Some of them
    stay in the file if the GPU has no room for all.
    """

    name: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class RunResult:
    """The latent of a run, (B, C, [T,] H, W) or packed, on the CPU; `last` is its last step with full x0 and x, if
    these were not sent before.
    """

    samples: Tensor
    random: RandomState
    last: StepDone | None


@dataclass(frozen=True, slots=True)
class HeldModel:
    """A model on a rank, and the bytes of its weights on the device, in this rank's own host memory, and of those that
    stay gathered on the device.
    """

    name: str
    sharding: str
    device_bytes: int
    host_bytes: int
    kept_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RankMemory:
    """The memory of one rank: bytes of its process on the host, and of its GPU if it has one: free, in total, and used
    by PyTorch for tensors; and the number of CUDA graphs, and the bytes that they keep to themselves.
    """

    process_bytes: int
    free_bytes: int
    total_bytes: int
    tensor_bytes: int
    models: tuple[HeldModel, ...]
    graphs: int = 0
    graph_bytes: int = 0


def random_state(device: torch.device) -> RandomState:
    """Return the states of this process's global generators."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return RandomState(torch.get_rng_state(), cuda)


def set_random_state(state: RandomState) -> None:
    """Let this process's global generators continue from these states."""
    torch.set_rng_state(state.cpu.clone())
    if state.cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state.cuda.clone())
