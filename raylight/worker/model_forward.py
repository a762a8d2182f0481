"""Single calls of a diffusion model's methods, done in a worker for a loop that runs elsewhere."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from raylight.cluster.serialization import SerializedObject, pack
from raylight.cluster.tensor_delta import Receiver, Slot
from raylight.host import patcher_state
from raylight.host.jobs import ForwardJob
from raylight.host.patcher_state import changed
from raylight.host.pickling import deserialize

from .node_code import AsBefore
from .parallel_model import ParallelModel


class ModelForward:
    """What a rank keeps between calls: tensors that come again, and what nodes have put into the model."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors = Receiver(device)
        self._extras: tuple[str, Any, Any] | None = None
        self._before: AsBefore | None = None

    def clear(self) -> None:
        """Let go of what nodes have put into a model, and of what their code has left on it."""
        self._extras = None
        if self._before is not None:
            self._before.restore()
            self._before = None

    def call(self, patcher: ModelPatcher, job: ForwardJob, split: ParallelModel) -> Any:
        """What the method returns, of a model that is split so; to be called in the mode of the model.

        Raises ValueError where code of nodes keeps a state on the model, of which its part in ComfyUI knows nothing.
        """
        worn, code, changes = self._unpacked(patcher, job)
        patcher_state.apply_state(patcher, worn, job.model.recipe.sharding)
        tensors = self._tensors.receive(job.tensors)

        def resolve(slot: Any) -> Tensor:
            assert isinstance(slot, Slot)
            return tensors[slot.number]

        args, kwargs, data = deserialize(job.call, patcher, resolve)
        patcher.model_options = {"transformer_options": data | _copied(code)}
        split.install(patcher.model_options, job.model)
        whole = job.model.inside.whole
        if whole and self._before is None:
            self._before = AsBefore(patcher)
        with changed(patcher, changes), split.watching(patcher, job.model.inside):
            comfy.model_management.load_models_gpu([patcher], memory_required=_memory(patcher, args))
            patcher.pre_run()
            diffusion_model = patcher.model.diffusion_model
            try:
                if job.method == "forward":
                    output = diffusion_model(*args, **kwargs, **patcher.model_options)
                else:
                    output = getattr(diffusion_model, job.method)(*args, **kwargs)
            finally:
                patcher.model.current_patcher = None
        state = self._before.state() if whole and self._before is not None else ""
        if state:
            raise ValueError(
                f"{whole} keeps {state} on the model from one step to the next, which cannot be shared "
                f"with ComfyUI, and the sampling loop stays there in this run (the log says why): remove "
                f"the node, or what keeps the loop there"
            )
        return output

    def _unpacked(self, patcher: ModelPatcher, job: ForwardJob) -> tuple[Any, Any]:
        # Unpacked once: some patches keep what they have computed.
        if self._extras is None or self._extras[0] != job.extras.key or self._extras[1] is not patcher.model:
            self.clear()
            self._extras = job.extras.key, patcher.model, deserialize(job.extras.get(), patcher)
        return self._extras[2]


def answer(output: Any) -> SerializedObject:
    """What a call returned, as it goes back."""
    return pack(output, lambda _: None)


def _copied(code: dict[str, Any]) -> dict[str, Any]:
    """Dicts and lists anew, as models and hooks may change them in place."""
    if isinstance(code, dict):
        return {name: _copied(value) for name, value in code.items()}
    return list(code) if isinstance(code, list) else code


def _memory(patcher: ModelPatcher, args: tuple[Any, ...]) -> float:
    first = next((value for value in args if isinstance(value, Tensor)), None)
    return 0 if first is None else patcher.model.memory_required(list(first.shape))
