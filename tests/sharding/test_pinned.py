"""Pinned memory of the size of what is in it; a CUDA that notes what it is asked to pin."""

from __future__ import annotations

import gc

import pytest
import torch

from raylight.sharding import pinned
from raylight.sharding.pinned import PinnedBuffer


class Cuda:
    def __init__(self, error: int) -> None:
        self.error = error
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.pinned[address] = nbytes
        return self.error

    def cudaHostUnregister(self, address: int) -> None:
        del self.pinned[address]


@pytest.fixture
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Cuda:
    fake = Cuda(getattr(request, "param", 0))
    monkeypatch.setattr(pinned, "_cudart", lambda: fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return fake


def test_tensors_lie_side_by_side_in_what_is_pinned(cuda: Cuda) -> None:
    like = [torch.empty(5, dtype=torch.float16), torch.empty(3, 50), torch.empty(0, 7)]
    buffer = PinnedBuffer([one.nbytes for one in like])
    ((start, nbytes),) = cuda.pinned.items()
    taken = [buffer.take(one).copy_(torch.full(one.shape, float(index))) for index, one in enumerate(like)]
    for index, (one, wanted) in enumerate(zip(taken, like, strict=True)):
        assert (one.shape, one.dtype) == (wanted.shape, wanted.dtype)
        assert (one == index).all()
        assert one.nbytes == 0 or start <= one.data_ptr() <= start + nbytes - one.nbytes
    assert len({one.untyped_storage().data_ptr() for one in taken[:2]}) == 2
    with pytest.raises(ValueError, match="4000 bytes do not fit"):
        buffer.take(torch.empty(1000))


def test_it_is_freed_with_the_last_tensor(cuda: Cuda) -> None:
    like = torch.empty(8)
    buffer = PinnedBuffer([like.nbytes, like.nbytes])
    part = buffer.take(like)[2:]
    other = buffer.take(like)
    del buffer, other
    gc.collect()
    assert cuda.pinned
    del part
    gc.collect()
    assert not cuda.pinned


@pytest.mark.parametrize("cuda", [2], indirect=True)
def test_memory_that_cannot_be_pinned_is_used_and_told(cuda: Cuda, caplog: pytest.LogCaptureFixture) -> None:
    taken = PinnedBuffer([8]).take(torch.empty(2)).fill_(1)
    assert taken.sum() == 2
    assert "could not be pinned (CUDA error 2)" in caplog.text
    del taken
    gc.collect()
    assert cuda.pinned  # what was not pinned is not unpinned
