"""The root cause among several errors, and the message that the user sees."""

from __future__ import annotations

import pytest
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError

from raylight.cluster.actor import RankActor
from raylight.cluster.diagnosis import Failure, WorkerStates, root_cause, to_error
from raylight.cluster.errors import DIED, FAILED, OUT_OF_MEMORY, OutOfMemory, is_out_of_memory
from raylight.cluster.place import Place

OF_A_PEER = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242")


@pytest.mark.parametrize(
    ("errors", "kind", "rank"),
    [
        ({0: OF_A_PEER, 1: ValueError("a cause")}, FAILED, 1),
        ({0: OF_A_PEER, 1: ActorDiedError()}, DIED, 1),
        ({0: KeyError("x"), 1: ActorDiedError()}, DIED, 1),
        (
            {0: OF_A_PEER, 1: OutOfMemoryError("Task was killed due to the node running low on memory")},
            OUT_OF_MEMORY,
            1,
        ),
        ({1: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 0: OF_A_PEER}, OUT_OF_MEMORY, 1),
        ({1: OF_A_PEER, 0: OF_A_PEER}, FAILED, 1),
    ],
)
def test_the_root_cause_among_errors(errors: dict[int, BaseException], kind: str, rank: int) -> None:
    failure = root_cause(errors)
    assert (failure.kind, failure.rank) == (kind, rank)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to ..."
        ),
        RuntimeError("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'"),
    ],
)
def test_out_of_memory(error: BaseException) -> None:
    assert is_out_of_memory(error) and not is_out_of_memory(OF_A_PEER)


@pytest.mark.parametrize(
    "text",
    [
        "NCCL Error 1: unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
        "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error, NCCL version 2.28.9\nncclUnhandledCudaError: "
        "Call to CUDA function failed.\nLast error:\nFailed to CUDA calloc async 608 bytes",
    ],
)
def test_nccl_that_does_not_say_why_cuda_failed(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = object.__new__(RankActor)  # its __init__ would redirect this process's logs
    rank._device, rank._service = torch.device("cuda", 0), None
    for free, kind in ((10 * 2**20, OutOfMemory), (10 * 2**30, RuntimeError)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 80 * 2**30))
        with pytest.raises(kind) as error, rank._explain_out_of_memory():
            raise RuntimeError(text)
        assert type(error.value) is kind
    assert root_cause({0: OF_A_PEER, 1: OutOfMemory(text)}).kind == OUT_OF_MEMORY


def test_pytorchs_gpu_number_becomes_the_machines() -> None:
    cause = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB"
    here = to_error(Failure(OUT_OF_MEMORY, 1, cause), WorkerStates({1: Place(1, "10.0.0.7", 42, "NVIDIA H100", 3)}))
    assert "GPU 3 has a total capacity" in str(here) and "GPU 0" not in str(here)
    unknown = to_error(Failure(OUT_OF_MEMORY, 1, cause), WorkerStates({1: Place(1, "10.0.0.7", 42, "NVIDIA H100")}))
    assert "GPU 0 has a total capacity" in str(unknown)


def test_the_message_has_place_phase_cause_output_and_remedies() -> None:
    states = WorkerStates({1: Place(1, "10.0.0.7", 42, "NVIDIA H100", 3)}, {1: "step 3 of 20"}, {1: ("last", "words")})
    assert str(to_error(Failure(FAILED, 1, "KeyError: 'x'"), states, lambda kind: f"What to do if it {kind}.")) == (
        "rank 1 (NVIDIA H100, GPU 3, pid 42 on 10.0.0.7) failed while step 3 of 20: KeyError: 'x'.\n"
        "Last output:\n  last\n  words\n"
        "What to do if it failed."
    )
