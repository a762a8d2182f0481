"""Workers compute on the kind of device that ComfyUI does, or are refused."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch

from raylight.driver import options


def computing_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device(name))


@pytest.mark.parametrize(
    ("name", "called"),
    [("xpu", "an Intel GPU"), ("mps", "an Apple GPU"), ("privateuseone", "DirectML"), ("hpu", "hpu")],
)
def test_other_accelerators_are_refused(name: str, called: str, monkeypatch: pytest.MonkeyPatch) -> None:
    computing_on(name, monkeypatch)
    with pytest.raises(ValueError, match=rf"ComfyUI computes on {called}.* NVIDIA and AMD .* --cpu"):
        options.all_workers()
    inputs = {
        "ray_cluster_address": "local",
        "ray_cluster_namespace": "default",
        "ulysses_degree": 0,
        "ring_degree": 1,
        "XFuser_attention": "auto",
    }
    for count in (0, 2):
        with pytest.raises(ValueError, match=f"ComfyUI computes on {called}"):
            options.workers_from(inputs | {"GPU": count})


def test_cpu_means_cpu_where_there_are_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ComfyUI with --cpu, whatever PyTorch finds."""
    computing_on("cpu", monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    workers = options.all_workers()
    assert workers.config.device_type == "cpu" and workers.config.world_size == 2


def test_gpus_are_one_for_each_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    computing_on("cuda", monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    workers = options.all_workers()
    assert workers.config.device_type == "cuda" and workers.config.world_size == 4
