"""After a cancel, at any time, the prompt ends within two seconds or one step, and the next one works."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import psutil
import pytest
import torch
from fault_server import BIG, JOB, LOADING, FaultServer, assert_same, dropin

from raylight.dev.demo.comfy_replies import PromptInterrupted
from raylight.dev.demo.graphs import Graph, on_workers

PROMISED_S = 2.0
REACTION_S = 2.0  # which ComfyUI itself takes to end a prompt on a busy machine
STEP_S = 0.4
SLOW = {"rank": -1, "what": "sleep", "call": 0, "seconds": STEP_S / 2}


def on_big(**initializer: bool) -> Graph:
    return on_workers(replace(JOB, model=BIG), 2, **initializer)


def with_big_lora() -> Graph:
    graph = on_big(FSDP=True)
    graph["lora"] = {
        "class_type": "RayLoraLoader",
        "inputs": {"lora_name": "big-lora.safetensors", "strength_model": 1.0},
    }
    graph["model"]["inputs"]["lora"] = ["lora", 0]
    return graph


def starting(server: FaultServer, before: list[psutil.Process]) -> bool:
    return sum(one not in before for one in server.workers()) == 2


@pytest.mark.parametrize(
    ("graph", "when"),
    [
        (on_workers(JOB, 2, ray_cluster_namespace="to be cancelled"), starting),
        (on_big(FSDP=True), lambda server, _: server.phases().get(1, "").startswith(LOADING)),
        (
            with_big_lora(),
            lambda server, _: server.phases().get(1, "").startswith(("reading LoRAs", "applying", "bringing")),
        ),
        (dropin(replace(JOB, steps=99), 2, SLOW), lambda server, _: server.step() >= 2),
        (
            dropin(JOB, 2, {"rank": -1, "what": "sleep", "where": "end", "seconds": 60.0}),
            lambda server, _: server.phases().get(1, "").startswith("ending the last step"),
        ),
    ],
    ids=["starting", "loading", "patching", "sampling", "gathering"],
)
def test_cancel_while(
    graph: Graph,
    when: Callable[[FaultServer, list[psutil.Process]], bool],
    server: FaultServer,
    reference: torch.Tensor,
) -> None:
    before = server.workers()
    prompt = server.submit(graph)
    server.wait_until(lambda: when(server, before))
    since = time.monotonic()
    server.interrupt(prompt)
    with pytest.raises(PromptInterrupted):
        server.wait(prompt, timeout=30)
    took = time.monotonic() - since
    assert took < PROMISED_S + REACTION_S, f"it took {took:.1f} s"
    assert_same(server.latent(on_workers(JOB, 2)), reference)


def test_the_first_of_two_in_the_queue(server: FaultServer, reference: torch.Tensor) -> None:
    first = server.submit(dropin(replace(JOB, steps=99), 2, SLOW))
    second = server.submit(on_workers(JOB, 2))
    server.wait_for_second_step()
    server.interrupt(first)
    with pytest.raises(PromptInterrupted):
        server.wait(first, timeout=30)
    server.wait(second, timeout=120)
    assert_same(server.latent(on_workers(JOB, 2)), reference)


def test_another_model_in_mid_queue(server: FaultServer, reference: torch.Tensor) -> None:
    other = replace(JOB, model="other.safetensors")
    jobs = [replace(job, seed=seed) for seed, job in enumerate((JOB, other, JOB, other))]
    for prompt in [server.submit(on_workers(job, 2)) for job in jobs]:
        server.wait(prompt, timeout=120)
    assert_same(server.latent(on_workers(JOB, 2)), reference)
