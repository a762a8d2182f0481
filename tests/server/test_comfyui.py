"""Graphs on a real ComfyUI server: its HTTP interface, its websocket, its interrupt."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared_server import MODEL, SharedServer

from raylight.dev.demo.comfy_listener import Event, Listener, Message
from raylight.dev.demo.comfy_replies import PromptFailed, PromptInterrupted, PromptRejected
from raylight.dev.demo.comfy_server import ComfyServer
from raylight.dev.demo.graphs import Graph, Sampling, on_workers, stock

LORAS = (("first.safetensors", 0.8), ("second.safetensors", -0.5))
FREED = "the workers have released their models"
JOB = Sampling(MODEL, width=144, height=112, frames=5, steps=4)


@pytest.fixture(scope="module")
def server(shared_server: SharedServer) -> ComfyServer:
    whole = (shared_server.models / MODEL).read_bytes()
    (shared_server.models / "broken.safetensors").write_bytes(whole[:100_000])
    for seed, (name, _) in enumerate(LORAS):
        shared_server.add_lora(name, ["lora", "loha"], seed)
    return shared_server


def latent(server: ComfyServer, graph: Graph) -> torch.Tensor:
    return load_file(server.output_files(server.run(graph, timeout=180), "save")[0])["latent_tensor"]


@pytest.fixture(scope="module")
def reference(server: ComfyServer) -> torch.Tensor:
    return latent(server, stock(JOB))


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert ((actual - expected).abs().max() / expected.std()).item() <= 1e-4


def started(server: ComfyServer) -> int:
    return server.log.read_text("utf-8", errors="replace").count("workers ready in")


def progress(listener: Listener, prompt: str) -> list[int]:
    return [
        event.data["value"]
        for event in listener.events("progress")
        if event.data["prompt_id"] == prompt and event.data["node"] == "sample"
    ]


@pytest.mark.smoke
def test_progress_previews_and_the_picture(server: ComfyServer, reference: torch.Tensor) -> None:
    with server.listen() as listener:
        prompt = server.submit(on_workers(JOB, 2))
        history = server.wait(prompt, timeout=180)
        listener.wait_for(lambda m: isinstance(m, Event) and m.type == "execution_success", 20)
        values = progress(listener, prompt)
        previews = [p for p in listener.previews if p.metadata.get("node_id") == "sample"]
    assert values[-1] == JOB.steps and sorted(values) == values
    assert len(values) == JOB.steps
    assert len(previews) == JOB.steps and all(p.image[:2] == b"\xff\xd8" for p in previews)
    assert_same(load_file(server.output_files(history, "save")[0])["latent_tensor"], reference)


def test_workers_are_kept_between_prompts(server: ComfyServer) -> None:
    latent(server, on_workers(JOB, 2))
    before = started(server)
    latent(server, on_workers(replace(JOB, seed=8), 2))
    latent(server, on_workers(replace(JOB, steps=2), 2, sync_ulysses=True, XFuser_attention="TORCH"))
    assert started(server) == before


def test_cancel_takes_one_step_and_the_next_prompt_works(server: ComfyServer, reference: torch.Tensor) -> None:
    with server.listen() as listener:
        prompt = server.submit(on_workers(replace(JOB, steps=200), 2))

        def third_step(message: Message) -> bool:
            return (
                isinstance(message, Event)
                and message.type == "progress"
                and message.data["prompt_id"] == prompt
                and message.data["node"] == "sample"
                and message.data["value"] == 3
            )

        listener.wait_for(third_step, 120)
        at_cancel = progress(listener, prompt)[-1]
        server.interrupt(prompt)
        with pytest.raises(PromptInterrupted):
            server.wait(prompt, timeout=30)
        steps = server.log.read_text("utf-8", errors="replace")
        assert progress(listener, prompt)[-1] < at_cancel + 20
    assert "Traceback" not in steps[steps.rfind("got prompt") :]
    before = started(server)
    assert_same(latent(server, on_workers(JOB, 2)), reference)
    assert started(server) == before, "cancel costs no worker"


@pytest.mark.slow
def test_another_number_of_workers_starts_anew(server: ComfyServer, reference: torch.Tensor) -> None:
    before = started(server)
    assert_same(latent(server, on_workers(JOB, 3)), reference)
    assert started(server) == before + 1


@pytest.mark.smoke
def test_a_ring_gives_the_same_picture(server: ComfyServer, reference: torch.Tensor) -> None:
    assert_same(latent(server, on_workers(JOB, 2, ulysses_degree=1, ring_degree=2)), reference)


@pytest.mark.parametrize("FSDP", [False, pytest.param(True, marks=pytest.mark.smoke)])
def test_loras_in_a_graph(FSDP: bool, server: ComfyServer, reference: torch.Tensor) -> None:
    plain = stock(JOB)
    for index, (name, strength) in enumerate(LORAS):
        plain[f"lora {index}"] = {
            "class_type": "LoraLoaderModelOnly",
            "inputs": {
                "model": [f"lora {index - 1}" if index else "model", 0],
                "lora_name": name,
                "strength_model": strength,
            },
        }
    plain["sample"]["inputs"]["model"] = ["lora 1", 0]
    expected = latent(server, plain)
    assert (expected - reference).std() > 0.02 * reference.std()

    parallel = on_workers(JOB, 2, FSDP=FSDP)
    for index, (name, strength) in enumerate(LORAS):
        before = {"prev_ray_lora": [f"lora {index - 1}", 0]} if index else {}
        parallel[f"lora {index}"] = {
            "class_type": "RayLoraLoader",
            "inputs": {"lora_name": name, "strength_model": strength, **before},
        }
    parallel["model"]["inputs"]["lora"] = ["lora 1", 0]
    assert_same(latent(server, parallel), expected)
    parallel["lora 0"]["inputs"]["strength_model"] = parallel["lora 1"]["inputs"]["strength_model"] = 0.0
    assert_same(latent(server, parallel), reference)


def test_freeing_memory_reaches_the_workers(server: ComfyServer, reference: torch.Tensor) -> None:
    latent(server, on_workers(replace(JOB, seed=9), 2))
    seen = server.log.read_text("utf-8", errors="replace").count(FREED)
    server.free()
    deadline = time.monotonic() + 20
    while server.log.read_text("utf-8", errors="replace").count(FREED) == seen:
        assert time.monotonic() < deadline, "the workers were not asked to free"
        time.sleep(0.2)
    before = started(server)
    assert_same(latent(server, on_workers(JOB, 2)), reference)
    assert started(server) == before


def test_rejects_degrees_before_anything_runs(server: ComfyServer) -> None:
    with pytest.raises(PromptRejected, match="ulysses_degree = 3 .* makes 3 workers, but GPU = 2"):
        server.submit(on_workers(JOB, 2, ulysses_degree=3))
    with pytest.raises(PromptRejected, match="ring_degree = 2 makes 4 workers, but GPU = 2"):
        server.submit(on_workers(JOB, 2, ring_degree=2))


def test_rejects_a_model_that_is_not_there(server: ComfyServer) -> None:
    with pytest.raises(PromptRejected, match="missing.safetensors"):
        server.submit(on_workers(replace(JOB, model="missing.safetensors"), 2))


def test_rejects_a_broken_file_and_goes_on(server: ComfyServer, reference: torch.Tensor) -> None:
    with pytest.raises(PromptFailed, match="broken.safetensors cannot be loaded"):
        server.run(on_workers(replace(JOB, model="broken.safetensors"), 2), timeout=120)
    assert_same(latent(server, on_workers(JOB, 2)), reference)


@pytest.mark.smoke
def test_all_nodes_are_there(server: ComfyServer) -> None:
    for node in (
        "RayInitializer",
        "RayInitializerAdvanced",
        "RayUNETLoader",
        "RayLoraLoader",
        "XFuserKSamplerAdvanced",
    ):
        assert server.object_info(node)["category"] == "Raylight"
    assert Path(server.log).exists()
