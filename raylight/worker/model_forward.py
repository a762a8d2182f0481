"""Single calls of a diffusion model's methods in a worker, for a sampling loop in ComfyUI's process."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from raylight.cluster.serialization import SerializedObject, pack
from raylight.cluster.tensor_delta import Receiver, Slot
from raylight.host import patcher_state
from raylight.host.jobs import AS_SENT, ForwardJob, set_random_state
from raylight.host.patcher_state import changed
from raylight.host.pickling import deserialize

from .graph_obstacles import obstacle
from .layouts import Tell
from .node_code import ModelSnapshot
from .parallel_model import ParallelModel


class ModelForward:
    """Calls of the diffusion model. Between them a rank keeps tensors that are sent again, and what nodes have set on
    the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors = Receiver(device)
        self._extras: tuple[str, Any, Any] | None = None  # the key, the model, and what is sent once in a run
        self._snapshot: ModelSnapshot | None = None

    def clear(self) -> None:
        """Release what nodes have set on a model, and what their code has left on it."""
        self._extras = None
        if self._snapshot is not None:
            self._snapshot.restore()
            self._snapshot = None

    def forget(self, model: BaseModel) -> None:
        """Release what is kept of a model, which is dropped; what is kept of another one stays."""
        if self._extras is not None and self._extras[1] is model:
            self.clear()

    def release(self) -> None:
        """Release all that is kept. The next call must begin another stream of tensors."""
        self.clear()
        self._tensors = Receiver(self._device)

    def call(self, patcher: ModelPatcher, job: ForwardJob, parallel: ParallelModel, tell: Tell) -> Any:
        """Call the job's method of the diffusion model, and return its output; to be called in the mode of the model.
        `tell` is as for `ParallelModel.install`.

        Raises ValueError: when code of nodes keeps state on the model, which ComfyUI's process would not have.
        """
        state, code, kept_values, kept_changes = self._extras_of(patcher, job)
        patcher_state.apply_state(patcher, state, job.model.recipe.sharding)
        tensors = self._tensors.receive(job.tensors)

        def resolve(slot: Any) -> Tensor:
            assert isinstance(slot, Slot)
            return tensors[slot.number]

        args, kwargs, data, values, changes = deserialize(job.call, patcher, resolve)
        values = {name: kept_values[name] if value is AS_SENT else value for name, value in values.items()}
        as_sent = {(one.owner, one.name): one for one in kept_changes}
        changes = [as_sent[one.owner, one.name] if one.value is AS_SENT else one for one in changes]
        patcher.model_options = {"transformer_options": data | _copied(code | values)}
        parallel.install(patcher.model_options, job.model, tell, job.begins_run)
        parallel.use_graphs(job.model, obstacle(patcher, changes, job.model))
        node = job.model.inside.full_tokens_for
        if node and self._snapshot is None:
            self._snapshot = ModelSnapshot(patcher)
        with changed(patcher, changes), parallel.watching(patcher, job.model.inside):
            comfy.model_management.load_models_gpu([patcher], memory_required=_memory(patcher, args))
            patcher.pre_run()
            if job.random is not None:
                set_random_state(job.random)
            diffusion_model = patcher.model.diffusion_model
            try:
                if job.method == "forward":
                    output = diffusion_model(*args, **kwargs, **patcher.model_options)
                else:
                    output = getattr(diffusion_model, job.method)(*args, **kwargs)
            finally:
                patcher.model.current_patcher = None
        if node and self._snapshot is not None and (path := self._snapshot.find_state()):
            raise ValueError(
                f"{node} keeps {path} on the model from one step to the next, which cannot be shared "
                f"with ComfyUI, and the sampling loop stays there in this run (the log says why): remove "
                f"the node, or what keeps the loop there"
            )
        return output

    def _extras_of(self, patcher: ModelPatcher, job: ForwardJob) -> tuple[Any, Any, Any, Any]:
        # Deserialized once: some patches keep what they have computed.
        if self._extras is None or self._extras[0] != job.extras.key or self._extras[1] is not patcher.model:
            self.clear()
            self._extras = job.extras.key, patcher.model, deserialize(job.extras.get(), patcher)
        return self._extras[2]


def answer(output: Any) -> SerializedObject:
    """Serialize what a call returned, for ComfyUI's process."""
    return pack(output, lambda _: None)


def _copied(code: dict[str, Any]) -> dict[str, Any]:
    """Copy dicts and lists, as models and hooks may change them in place."""
    if isinstance(code, dict):
        return {name: _copied(value) for name, value in code.items()}
    return list(code) if isinstance(code, list) else code


def _memory(patcher: ModelPatcher, args: tuple[Any, ...]) -> int:
    first = next((value for value in args if isinstance(value, Tensor)), None)
    return 0 if first is None else int(patcher.model.memory_required(list(first.shape)))
