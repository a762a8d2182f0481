"""GPU memory that ComfyUI and the workers share.

Both keep one rule: who needs memory of a GPU asks the other for what is missing there and no more, and what was used
least recently goes first. To ComfyUI the workers' weights are one more model in its list of loaded models, which is in
the order of last use. docs/memory.md has the details.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from raylight.cluster.errors import RunCancelled
from raylight.cluster.session import Session
from raylight.host.gpu_identity import gpu_identity
from raylight.host.jobs import GivenBack, NeedsBytes
from raylight.host.log_messages import gb
from raylight.host.worker_service import WorkerService

from . import forward_channel

logger = logging.getLogger(__name__)

_EVERYTHING = 1e29  # bytes: ComfyUI asks for more than any GPU has when the user wants all models unloaded


class _Workers:
    """The workers of a session as ComfyUI knows them, and what they hold on GPUs that ComfyUI sees."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.entries: list[WorkersOnGpu] = []
        self._held: dict[int, int] = {}
        self._has_changed = self._may_hold = True
        answers = self._ask({})
        self.knows_gpus = bool(answers)
        ranks = {answer.gpu: rank for rank, answer in answers.items() if answer.gpu}
        own = comfy.model_management.get_torch_device()
        seen = torch.cuda.device_count() if ranks and own.type == "cuda" else 0
        for device in dict.fromkeys([own, *(torch.device("cuda", index) for index in range(seen))]):
            rank = ranks.get(gpu_identity(device))
            if rank is not None or device == own:  # there for the user's wish to unload all
                self.entries.append(WorkersOnGpu(self, device, rank))

    def held(self, rank: int) -> int:
        """Return how many bytes of weights a rank has on its GPU. It gives back what it does not use, so that ComfyUI
        sees how much is free.
        """
        if self._has_changed and self._may_hold:
            self._ask({entry.rank: 0 for entry in self.entries if entry.rank is not None})
        return self._held.get(rank, 0)

    def give_back(self, rank: int, wanted: int) -> None:
        """Have a rank give back so many bytes of its GPU."""
        if not self._may_hold:
            return
        answers = self._ask({rank: wanted})
        if rank in answers:
            freed, held = gb(answers[rank].freed), gb(self._held[rank])
            logger.info("rank %d gives %s of its GPU to ComfyUI, and keeps %s of weights there", rank, freed, held)

    def release(self) -> None:
        """Have all ranks release their models, and let go what is kept here for their forwards."""
        forward_channel.drop()
        self.session.shared.clear()
        if not self._may_hold or not self._can_ask():
            return
        try:
            self.session.run(WorkerService.free)
        except (Exception, RunCancelled) as error:
            logger.warning("the workers could not free their memory: %s", error)
        else:
            logger.info("the workers have released their models")
            self._held, self._may_hold = {}, False

    def note_use(self) -> None:
        """Note that the workers have done something with a model: they are in use now, and hold other bytes."""
        self._has_changed = self._may_hold = True

    def _ask(self, wanted: dict[int, int]) -> dict[int, GivenBack]:
        """Return the answers by rank; none where the workers cannot answer, and the log says why."""
        if not self._can_ask():
            return {}
        try:
            answers = self.session.run_all(WorkerService.give_back, wanted)
        except (Exception, RunCancelled) as error:
            logger.warning("the workers could not give memory back: %s", error)
            return {}
        self._held, self._has_changed = {rank: answer.held for rank, answer in answers.items()}, False
        return answers

    def _can_ask(self) -> bool:
        if not self.session.alive:
            return False
        if self.session.busy:  # a node looks at a step, say: an answer would come after the run that waits for the node
            logger.info("the workers are in a run, and keep their memory until its end")
            return False
        return True


class _NoWeights(ModelPatcher):
    """A patcher that has no weights, and has the size of a rank's."""

    def __init__(self, workers: _Workers, device: torch.device, rank: int | None) -> None:
        super().__init__(nn.Module(), device, torch.device("cpu"), size=1)
        self._workers, self._rank = workers, rank

    def model_size(self) -> int:
        return self.loaded_size()

    def loaded_size(self) -> int:
        return 0 if self._rank is None else self._workers.held(self._rank)


class WorkersOnGpu(comfy.model_management.LoadedModel):
    """What the workers have on one of ComfyUI's devices, in ComfyUI's list of loaded models.

    `rank` is that of the worker on this GPU, None if there is none.
    """

    def __init__(self, workers: _Workers, device: torch.device, rank: int | None) -> None:
        self._workers, self.rank = workers, rank
        self._patcher = _NoWeights(workers, device, rank)  # ComfyUI itself keeps no patcher alive
        super().__init__(self._patcher)
        self.real_model = weakref.ref(self._patcher.model)

    def model_offloaded_memory(self) -> float:
        """Return what puts the workers first among those that ComfyUI asks for memory: they know what is less recently
        used, and ComfyUI's own order does not.
        """
        return math.inf

    def model_unload(self, memory_to_free: float | None = None, unpatch_weights: bool = True) -> bool:
        """Free what ComfyUI lacks and models that were used less recently than the workers do not have. Return whether
        ComfyUI should forget this: only where the workers have ended.
        """
        if memory_to_free is None or memory_to_free >= _EVERYTHING:
            self._workers.release()
        elif self.rank is not None:
            share = math.ceil(memory_to_free) - sum(one.model_loaded_memory() for one in self._older())
            if share > 0:
                self._workers.give_back(self.rank, share)
        return not self._workers.session.alive

    def lend_room(self, need: NeedsBytes) -> int:
        """Have ComfyUI free what the rank needs on this GPU: first its models that were not used since the workers, and
        others only for what the rank could not move away itself; but none that the run uses, which does not load them
        again. Return how many bytes that were.
        """
        target = _free_for_others(self.device) + need.missing
        comfy.model_management.soft_empty_cache()
        older = self._older()
        listed = comfy.model_management.current_loaded_models
        newer = [one for one in listed if one not in older]
        of_run = [one for one in listed if any(one.model is used for used in _of_run or ())]
        for keep, movable in (([*newer, *of_run], 0), ([self, *of_run], need.movable)):
            missing = target - _free_for_others(self.device) - movable
            if missing > 0:
                _unload(self.device, missing, keep)
        freed = _free_for_others(self.device) + need.missing - target
        logger.info("ComfyUI has freed %s for rank %d, which lacked %s", gb(freed), self.rank, gb(need.missing))
        return freed

    def _older(self) -> list[comfy.model_management.LoadedModel]:
        """Return ComfyUI's models on this GPU that were not used since the workers."""
        listed = comfy.model_management.current_loaded_models
        place = listed.index(self) if self in listed else len(listed)
        return [one for one in listed[place + 1 :] if one.device == self.device and one.model is not None]


_workers: _Workers | None = None
_of_run: list[ModelPatcher] | None = None  # ComfyUI's models that the run in its process uses, if there is a run


@contextmanager
def run_in_comfyui() -> Iterator[None]:
    """For the time of a run in ComfyUI's process, keep the models that `note_models_of_run` gets."""
    global _of_run
    around, _of_run = _of_run, [*(_of_run or ())]
    try:
        yield
    finally:
        _of_run = around


def note_models_of_run(models: Sequence[ModelPatcher]) -> None:
    """Note that the run, if there is one, uses these models: until it ends they stay where they are."""
    if _of_run is not None:
        _of_run.extend(models)


def register(session: Session) -> None:
    """Put what the workers of `session` hold into ComfyUI's list of loaded models, in the place of what others held.
    Does nothing if it is there already.
    """
    global _workers
    listed = comfy.model_management.current_loaded_models
    if (
        _workers is not None
        and _workers.session is session
        and _workers.knows_gpus
        and all(one in listed for one in _workers.entries)
    ):
        return
    _workers = _Workers(session)
    _put_first(_workers.entries)


def note_use(session: Session) -> None:
    """Note that the workers have used a model: they are the most recently used now."""
    if _workers is not None and _workers.session is session:
        _workers.note_use()
        _put_first(_workers.entries)


def others_were_used_since(session: Session) -> bool:
    """Return whether ComfyUI has used a model since the workers, which may have given back memory for it."""
    if _workers is None or _workers.session is not session:
        return False
    return comfy.model_management.current_loaded_models[: len(_workers.entries)] != _workers.entries


def make_room(session: Session, needs: Mapping[int, NeedsBytes]) -> bool:
    """Have ComfyUI free what ranks need on GPUs that it shares with them: it can do nothing for other ranks. Return
    whether that was anything.
    """
    if _workers is None or _workers.session is not session:
        return False
    freed = False
    for entry in _workers.entries:
        need = None if entry.rank is None else needs.get(entry.rank)
        if need is not None and need.missing > 0:
            freed |= entry.lend_room(need) > 0
    return freed


def _put_first(entries: Sequence[WorkersOnGpu]) -> None:
    listed = comfy.model_management.current_loaded_models
    listed[:] = [*entries, *(one for one in listed if not isinstance(one, WorkersOnGpu))]


def _free_for_others(device: torch.device) -> int:
    """Return how many bytes of a GPU are free, without those that PyTorch keeps for this process."""
    total, own = comfy.model_management.get_free_memory(device, torch_free_too=True)  # type: ignore[misc]
    return int(total - own)


def _unload(device: torch.device, missing: int, keep: Sequence[comfy.model_management.LoadedModel]) -> None:
    """Have ComfyUI unload models until so many more bytes are free for all."""
    free = comfy.model_management.get_free_memory(device)
    comfy.model_management.free_memory(free + missing, device, [*keep])  # type: ignore[operator]
    comfy.model_management.soft_empty_cache()
