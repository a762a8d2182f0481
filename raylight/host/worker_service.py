"""The verbs of a worker: what the driver can call on all ranks by `Session.run` and `Session.run_all`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol

import numpy as np

from raylight.cluster.config import Service
from raylight.cluster.run import Run
from raylight.cluster.serialization import SerializedObject

from .jobs import ForwardJob, GivenBack, NeedsBytes, RankMemory, RunJob, RunResult
from .model_files import FoundFile, ModelFile
from .recipe import ModelRecipe
from .vae_jobs import VaeJob, VaeResult


class WorkerService(Service, Protocol):
    """The models of one rank. Every verb is called on all ranks with the same arguments.

    `run` is given by the worker, not by the caller. Verbs marked collective exchange data between the ranks.
    With `may_refuse` a verb returns NeedsBytes, on all ranks, if GPU memory is short: to load the model, or, when that
    is done, to sample.
    Any of them may raise OutOfMemory; RunCancelled passes where the run was cancelled.
    """

    @abstractmethod
    def load(self, run: Run, recipe: ModelRecipe, may_refuse: bool = False) -> NeedsBytes | None:
        """Load the model of `recipe`, split over the ranks, with its LoRAs; does nothing if it is loaded already.

        Collective. Raises ValueError: for a file that is no such model, too few heads for its plan, or a LoRA that
        does not fit. Other models stay loaded, and the session stays usable.
        """

    @abstractmethod
    def sample(self, run: Run, jobs: tuple[RunJob, ...], may_refuse: bool = False) -> dict[int, RunResult] | NeedsBytes:
        """Do complete runs of one model, divided among the groups of the batch axis. All ranks share a single run.

        Return, on the first rank of each group, the results of its runs by their index in `jobs`; on others nothing.
        Rank 0 emits `(index, StepDone)` after every step of its runs. All runs can be cancelled at each step.
        Collective. Raises ValueError: as `load`, and for an input that the model's plan does not support.
        """

    @abstractmethod
    def forward(self, run: Run, job: ForwardJob, may_refuse: bool = False) -> SerializedObject | NeedsBytes | None:
        """Call a method of the diffusion model once. Return its serialized output on rank 0, None on others.

        Collective. Raises ValueError: as `sample`.
        """

    @abstractmethod
    def vae_decode(self, run: Run, job: VaeJob, may_refuse: bool = False) -> VaeResult | NeedsBytes:
        """Decode a latent with a VAE that is split by rows; load it before, unless it is loaded already.

        Rank 0 emits VaeProgress where there are several images. It can be cancelled between modules of the VAE.
        Collective. Raises ValueError: for a file that is no VAE, and if the picture has no room in system memory.
        """

    @abstractmethod
    def vae_encode(self, run: Run, job: VaeJob, may_refuse: bool = False) -> VaeResult | NeedsBytes:
        """Encode pictures with a VAE, as `vae_decode`. Raises ValueError: also if the file has no encoder."""

    @abstractmethod
    def free(self, run: Run) -> None:
        """Unload every model, and forget the tensors that calls of `forward` have sent: the next begins a stream."""

    @abstractmethod
    def give_back(self, run: Run, wanted: dict[int, int]) -> GivenBack:
        """Give back GPU memory on the ranks that `wanted` names: what is not in use, and weights, those of the least
        recently used model first, until it is as many bytes as `wanted` has for the rank. Models stay, and come back to
        the GPU when they are used.

        Collective.
        """

    @abstractmethod
    def memory(self, run: Run) -> RankMemory:
        """Return how much memory this rank uses, and its models, the least recently used first."""

    @abstractmethod
    def find_files(self, run: Run, files: tuple[ModelFile, ...]) -> tuple[FoundFile, ...]:
        """Return what this rank's machine has of files of ComfyUI's machine. Where it has them, they are read there."""

    @abstractmethod
    def receive_file(self, run: Run, file: ModelFile, offset: int, data: np.ndarray, ranks: frozenset[int]) -> None:
        """Write a part of a file, (bytes,) uint8, into the cache of this rank's machine, if `ranks` has this rank.

        Raises OSError: when it cannot be written. Raises ValueError: when the file is not what was described.
        """
