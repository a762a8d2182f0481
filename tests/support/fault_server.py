"""A ComfyUI server for fault tests, with access to its workers' processes and phases."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from loras import lora_for
from safetensors.torch import load_file, save_file
from search_path import search_path

from raylight.cluster.orphan_guard import is_running, name_of
from raylight.cluster.status import IDLE, STARTING
from raylight.dev.demo.comfy_replies import ComfyError, PromptFailed
from raylight.dev.demo.comfy_server import ComfyServer
from raylight.dev.demo.graphs import Graph, Sampling, on_workers
from raylight.dev.demo.prompts import random_prompt, write_prompt
from raylight.dev.demo.tiny import write_checkpoint

SUPPORT = Path(__file__).resolve().parent
JOB = Sampling("wan.safetensors", width=112, height=80, frames=5, steps=4)
BIG = "big.safetensors"  # takes a while to read
LOADING = ("loading", "reading", "putting", "applying", "bringing")  # phases until a model can compute; each is short
# Usually an error is shown after 1 to 4 s. Without what finds it, it would come after minutes, or never.
ERROR_S, EXIT_S = 10.0, 10.0


def write_files(folder: Path) -> None:
    """Write models, good and bad, LoRAs, prompts and the pack that injects faults."""
    models, prompts = folder / "models", folder / "datasets"
    write_checkpoint(models / JOB.model, "wan-t2v", heads=3)
    write_checkpoint(models / "other.safetensors", "wan-t2v", heads=3, seed=1)
    write_checkpoint(models / BIG, "wan-t2v", heads=8, layers=8)
    write_prompt(prompts / "positive", random_prompt(9, 4096, seed=1))
    write_prompt(prompts / "negative", random_prompt(6, 4096, seed=2))
    content = (models / JOB.model).read_bytes()
    (models / "truncated.safetensors").write_bytes(content[:100_000])
    (models / "corrupt.safetensors").write_bytes(bytes(200) + content[200:])
    save_file({"a": torch.zeros(3)}, models / "architecture.safetensors")
    for name, like in (("lora.safetensors", JOB.model), ("big-lora.safetensors", BIG), ("unfit.safetensors", BIG)):
        shapes = {f"diffusion_model.{key}": tuple(tensor.shape) for key, tensor in load_file(models / like).items()}
        save_file(lora_for(shapes, ["lora"], 1), folder / "models" / name)
    save_file({"diffusion_model.blocks.0.self_attn.q.set_weight": torch.zeros(3, 3)}, models / "set.safetensors")
    shutil.copytree(SUPPORT / "fault_pack", folder / "packs" / "fault_pack")


class FaultServer(ComfyServer):
    """ComfyUI with the files of `write_files`, in a folder `name` of its own."""

    def __init__(self, files: Path, name: str, **environ: str) -> None:
        paths = {
            "diffusion_models": files / "models",
            "loras": files / "models",
            "datasets": files / "datasets",
            "custom_nodes": files / "packs",
        }
        self._runs = 0
        super().__init__(
            files / name, model_paths=paths, environ={"PYTHONPATH": search_path([str(SUPPORT)]), **environ}
        )

    def latent(self, graph: Graph) -> torch.Tensor:
        """Run a graph and return the latent that it saves."""
        return load_file(self.output_files(self.run(graph, timeout=180), "save")[0])["latent_tensor"]

    def submit(self, graph: Graph) -> str:
        """Queue a graph. If the queue is empty, first wait until workers report no phase of an earlier run: a test that
        waits for a phase means its own prompt's.
        """
        if not (queue := self.queue()).running and not queue.pending:
            self.wait_until(lambda: set(self.phases().values()) <= {STARTING, IDLE})
        return super().submit(graph)

    def phases(self) -> dict[int, str]:
        """Return the phase of each worker; {} if there are none, or they are starting."""
        return {int(rank): phase for rank, phase in self._get("/faults/phases").items()}

    def process(self) -> psutil.Process:
        """Return ComfyUI's own process."""
        return psutil.Process(self.pid)

    def workers(self) -> list[psutil.Process]:
        """Return the processes of workers."""
        return [child for child in self.process().children(recursive=True) if is_worker(child)]

    def workers_of_now(self, workers: int = 2, **initializer: Any) -> list[psutil.Process]:
        """Return the processes of that many workers, which are started if they do not run."""
        self._runs += 1  # ComfyUI would run nothing for a graph that comes again
        self.latent(on_workers(replace(JOB, seed=1000 + self._runs, steps=1), workers, **initializer))
        return self.wait_until(lambda: len(found := self.workers()) == workers and found)

    def process_of(self, name: str) -> psutil.Process | None:
        """Return ComfyUI's descendant of this name, if there is one."""
        return next((child for child in self.process().children(recursive=True) if name_of(child) == name), None)

    def log_size(self) -> int:
        """Return the size of the log, for `logged`."""
        return self.log.stat().st_size

    def logged(self, text: str, since: int) -> bool:
        """Return whether the log has a text after its first `since` bytes. Its last lines are soon others."""
        return text in self.log.read_bytes()[since:].decode("utf-8", errors="replace")

    def worker(self, rank: int) -> psutil.Process:
        """Return the process of a rank, which the log names."""
        line = [line for line in self.log_tail(10_000).splitlines() if "workers ready in" in line][-1]
        return psutil.Process(int(line.split(f"rank {rank} (")[1].split("pid ")[1].split(" ")[0]))

    def wait_until(self, condition: Callable[[], Any], timeout_s: float = 180.0) -> Any:
        """Poll `condition` and return its first true value."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            assert time.monotonic() < deadline, f"the condition never became true. The log:\n{self.log_tail(60)}"
            time.sleep(0.01)
        return value

    def wait_for_phase(self, start: str | tuple[str, ...], rank: int = 1) -> None:
        """Wait until the phase of a worker begins with `start`, or one of several."""
        self.wait_until(lambda: self.phases().get(rank, "").startswith(start))

    def step(self) -> int:
        """Return the number of the step that rank 1 is in, 0 if in none."""
        found = re.match(r"step (\d+) of", self.phases().get(1, ""))
        return int(found[1]) if found else 0

    def wait_for_second_step(self) -> None:
        """Wait until the first step is over. On a busy machine the second may be missed, and a later one be seen."""
        self.wait_until(lambda: self.step() >= 2)

    def fails(self, prompt: str, match: str, since: float | None = None) -> str:
        """Assert that a prompt ends with an error within ERROR_S of `since` (now). Return the message."""
        since = time.monotonic() if since is None else since
        with pytest.raises(PromptFailed, match=match) as error:
            self.wait(prompt, timeout=90)
        took = time.monotonic() - since
        assert took < ERROR_S, f"the error came after {took:.1f} s:\n{error.value}"
        return str(error.value)

    def assert_ended(self, processes: list[psutil.Process]) -> None:
        """Assert that processes end by themselves."""
        _, left = psutil.wait_procs(processes, timeout=EXIT_S)
        left = [process for process in left if is_running(process)]
        assert not left, f"left: {left}"


def is_worker(process: psutil.Process) -> bool:
    return name_of(process).startswith("ray::RankActor") and is_running(process)


def dropin(job: Sampling, workers: int, fault: dict[str, Any] | None = None, **initializer: Any) -> Graph:
    """Return the graph of a job on the drop-in MODEL, with a fault in it."""
    graph = on_workers(job, workers, **initializer)
    graph["model"]["class_type"] = "RayModelLoader"
    sampler = graph["sample"]
    sampler["class_type"] = "KSamplerAdvanced"
    sampler["inputs"]["model"] = sampler["inputs"].pop("ray_actors")
    if fault is not None:
        inputs = {"rank": 1, "what": "raise", "where": "model", "call": 1, "seconds": 0.0} | fault
        graph["fault"] = {"class_type": "InjectFault", "inputs": inputs | {"model": ["model", 0]}}
        sampler["inputs"]["model"] = ["fault", 0]
    return graph


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert ((actual - expected).abs().max() / expected.std()).item() <= 1e-4


__all__ = ["BIG", "JOB", "ComfyError", "FaultServer", "assert_same", "dropin", "is_running", "write_files"]
