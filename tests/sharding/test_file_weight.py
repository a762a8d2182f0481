"""Weights that stay in their file: what of ComfyUI's and PyTorch's handling they take part in.

The CPU by its number is used as a GPU: PyTorch copies what is moved there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from raylight.sharding import staged_read
from raylight.sharding.file_weight import FileWeight
from raylight.sharding.lazy_concat import LazyConcatMode

CPU, GPU = torch.device("cpu"), torch.device("cpu", 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.fixture(autouse=True, params=[torch.no_grad, torch.inference_mode])
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    with request.param():
        yield


@pytest.fixture
def in_file() -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).bfloat16()


def weight_of(in_file: Tensor, dtype: torch.dtype = torch.float16) -> nn.Parameter:
    return nn.Parameter(FileWeight.of(in_file, dtype), requires_grad=False)


@pytest.mark.parametrize("own", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_it_has_the_values_of_a_conversion_in_steps(stored: torch.dtype, own: torch.dtype, in_file: Tensor) -> None:
    wanted = torch.empty(6, 4, dtype=own).copy_(in_file.to(stored))
    weight = weight_of(in_file.to(stored), own)
    for dtype in (own, torch.float32, torch.bfloat16):
        assert same(weight.to(GPU, dtype), wanted.to(dtype))
        assert same(torch.empty(6, 4, dtype=dtype).copy_(weight), wanted.to(dtype))
    assert (weight.dtype, weight.shape, weight.nbytes, weight.device) == (own, wanted.shape, wanted.nbytes, CPU)


def test_what_it_reads_is_as_much_as_the_file_has(in_file: Tensor) -> None:
    weight, read = FileWeight.of(in_file, torch.float32), []
    with staged_read.reported_to(read.append):
        weight.to(GPU)
        weight[2:3].to(GPU)
        torch.empty_like(weight)
        weight.detach()[...]
    assert sum(read) == in_file.nbytes + in_file[0].nbytes
    assert (weight.file_bytes, weight[2:3].file_bytes) == (in_file.nbytes, in_file[0].nbytes)


def test_rows_stay_in_the_file(in_file: Tensor) -> None:
    rows = weight_of(in_file)[1:5][1:]
    assert type(rows) is FileWeight
    assert same(rows.to(GPU), in_file[2:5].half())
    assert same(weight_of(in_file)[:, 1:3], in_file[:, 1:3].half())


def test_a_joined_weight_is_read_in_its_pieces() -> None:
    pieces = [torch.randn(2, 3).bfloat16() for _ in range(3)]
    with LazyConcatMode():
        joined = torch.empty([6, 3], device=CPU, dtype=torch.bfloat16)
    for index, piece in enumerate(pieces):
        joined.narrow(0, 2 * index, 2)[:] = piece
    weight = FileWeight.of(nn.Parameter(joined, requires_grad=False), torch.float16)
    assert same(weight.to(GPU), torch.cat(pieces).half())
    assert same(weight[1:4].to(GPU), torch.cat(pieces)[1:4].half())
    assert weight[1:4].file_bytes == 3 * 3 * 2


@pytest.mark.parametrize(
    "use",
    [
        lambda weight: weight + 1,
        lambda weight: nn.functional.linear(torch.ones(2, 4, dtype=weight.dtype), weight),
        lambda weight: weight.t().contiguous(),
        lambda weight: weight.reshape(-1)[3],
        lambda weight: weight.to(torch.float32).norm(),
        lambda weight: weight.clone(),
        lambda weight: torch.stack([weight, weight]),
        lambda weight: weight.view(4, 6),
        lambda weight: torch.tensor(weight.tolist()),
        lambda weight: torch.from_numpy(weight.numpy()),
    ],
)
def test_other_operations_take_its_values(use: Callable[[Tensor], Tensor], in_file: Tensor) -> None:
    assert same(use(weight_of(in_file)), use(in_file.half()))


def test_what_is_written_to_it_stays_and_leaves_the_file(in_file: Tensor) -> None:
    before, weight = in_file.clone(), weight_of(in_file)
    alias = weight.detach()
    weight.data.copy_(torch.ones(6, 4))
    weight.data.mul_(3)
    for one in (weight, alias, alias[:]):
        assert same(one.to(GPU), torch.full((6, 4), 3.0, dtype=torch.float16))
    assert same(FileWeight.of(weight, weight.dtype).to(GPU), in_file.half())
    assert same(in_file, before)


def test_a_number_can_be_one() -> None:
    number = weight_of(torch.tensor(2.5))
    assert same(number.to(GPU), torch.tensor(2.5).half())
    assert number.item() == 2.5


def test_a_module_takes_what_it_was_moved_to(in_file: Tensor) -> None:
    module = nn.Linear(4, 6, bias=False)
    module.weight = weight_of(in_file)
    assert type(module.to(CPU).weight) is FileWeight
    assert type(module.state_dict()["weight"]) is FileWeight
    assert type(copy.deepcopy(module).weight) is FileWeight
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        module.to(GPU)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert type(module.weight) is nn.Parameter
    assert same(module.weight, in_file.half())


def test_a_listener_ends_a_read(in_file: Tensor) -> None:
    def stop(_: int) -> None:
        raise KeyError

    with staged_read.reported_to(stop), pytest.raises(KeyError):
        weight_of(in_file).to(GPU)


def same(actual: Tensor, wanted: Tensor) -> bool:
    return actual.dtype == wanted.dtype and torch.equal(actual.float(), wanted.float())
