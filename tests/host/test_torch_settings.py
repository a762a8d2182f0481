"""PyTorch's settings of ComfyUI's process, in a worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from raylight.host import torch_settings


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = torch_settings.read()
    yield
    torch_settings.apply(before)


def test_a_setting_goes_to_another_process() -> None:
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    torch.backends.cudnn.benchmark = True
    there = torch_settings.read()
    torch.backends.cuda.matmul.allow_fp16_accumulation = False
    torch.backends.cudnn.benchmark = False
    assert torch_settings.apply(there)
    assert torch.backends.cuda.matmul.allow_fp16_accumulation
    assert torch.backends.cudnn.benchmark
    assert not torch_settings.apply(there)


def test_what_this_pytorch_does_not_have_is_left_out() -> None:
    assert not torch_settings.apply((("cuda.matmul.allow_something_new", True),))
