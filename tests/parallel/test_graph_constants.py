"""Constants by the device `meta` in the place of a GPU: copies to it are found in the same way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from raylight.parallel.graph_constants import recorded, supplied
from raylight.parallel.graph_inputs import NotStaticError

META = torch.device("meta")


def forward(x: Tensor, start: float = 0.0) -> Tensor:
    table = torch.arange(4.0) + start
    x = x + table.to(x.device)
    x = x + torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device)
    x = x[torch.tensor([0, 1, 2])]
    x.copy_(torch.ones(3))
    return x * x.new_tensor(2.0)


@pytest.mark.parametrize("inference", [True, False])
def test_copies_are_recorded_and_supplied(inference: bool) -> None:
    with torch.inference_mode(inference), torch.no_grad():
        x = torch.empty(4, device=META)
        with recorded(META) as recorder:
            forward(x)
        copies = recorder.constants.copies
        assert [source.shape for source, _ in copies] == [(4,), (4,), (3,), (3,), ()]
        assert torch.equal(copies[1][0], torch.tensor([1.0, 2.0, 3.0, 4.0]))
        assert recorder.obstacle == ""
        with supplied(recorder.constants, META, [x]) as supplier:
            assert forward(x).device == META
        assert len(supplier.outside) == 0 or all(tensor.device == META for tensor in supplier.outside)


def test_other_values_are_refused() -> None:
    with torch.inference_mode():
        x = torch.empty(4, device=META)
        with recorded(META) as recorder:
            forward(x)
        with pytest.raises(NotStaticError, match="other values"), supplied(recorder.constants, META, [x]):
            forward(x, start=1.0)
        with pytest.raises(NotStaticError, match="same constants"), supplied(recorder.constants, META, [x]):
            x.add(1)


@pytest.mark.parametrize(
    ("wait", "operator"),
    [
        (lambda x: x.sum().item(), "item"),
        (lambda x: bool(x.any()), "is_nonzero"),
        (lambda x: x.sum().cpu().item(), "to"),
        (lambda x: x[x > 0], "index"),
    ],
)
def test_waits_of_the_host_are_found(wait, operator: str) -> None:
    cuda = torch.device("cuda", 0)
    with FakeTensorMode(), torch.no_grad():
        x = torch.ones(3, device=cuda)
        with recorded(cuda) as recorder:
            try:
                wait(x)
            except (DataDependentOutputException, RuntimeError):
                pass
    assert "the host waits for the GPU" in recorder.obstacle
    assert operator in recorder.obstacle or "scalar" in recorder.obstacle
