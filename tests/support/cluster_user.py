"""ComfyUI's process on the first machine of a cluster, as tests use it."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import machines
import psutil
import torch
from comfy_cases import CASES, checkpoint, sample_stock

STEPS = 3
CASE = "Wan T2V"
TOLERANCE = 1e-4
RUNS = "the workers do the whole run"  # in the log


class ClusterUser:
    """ComfyUI's process on alpha. The model file is in a model folder of alpha."""

    def __init__(self, cluster: machines.FakeCluster) -> None:
        self.cluster = cluster
        folder = cluster.alpha.folder / cluster.alpha.models
        self.file = checkpoint(folder, CASES[CASE])
        self.path = str(cluster.alpha.here / cluster.alpha.models / self.file.name)
        alpha = cluster.alpha
        folders = alpha.here / alpha.models, alpha.here / alpha.packs
        self._process = cluster.python("cluster_driver.py", cluster.address, *folders)
        self._expected: dict[Any, torch.Tensor] = {}

    def begin(self, verb: str, value: Any = None, **options: Any) -> None:
        """Send a request."""
        self._process.stdin.write(json.dumps({verb: value, **options}) + "\n")
        self._process.stdin.flush()

    def end(self) -> dict[str, Any]:
        """Return the answer to the last request, when it comes."""
        line = self._process.stdout.readline()
        assert line, f"the driver has ended:\n{self.cluster.log()[-5000:]}"
        return json.loads(line)

    def ask(self, verb: str, value: Any = None, **options: Any) -> dict[str, Any]:
        self.begin(verb, value, **options)
        return self.end()

    def sent_to_beta(self, name: str) -> list[Path]:
        """Return the files of this name that beta was sent and keeps."""
        folder = self.cluster.beta.folder / ".cache" / "raylight"
        return [path for path in folder.glob("*") if path.name.endswith(name)]

    def begin_long(self) -> None:
        """Begin a run of thousands of steps on both machines, and wait until it goes on."""
        before = self.cluster.log().count(RUNS)
        self.begin("sample", CASE, path=self.path, mesh=[1, 1, 2], steps=5000)
        deadline = time.monotonic() + 90
        while self.cluster.log().count(RUNS) == before:
            assert time.monotonic() < deadline, self.cluster.log()[-5000:]
            time.sleep(0.1)
        time.sleep(1)  # some steps

    def interrupt(self) -> None:
        """Cancel what runs."""
        psutil.Process(self._process.pid).children()[0].send_signal(signal.SIGUSR1)

    def latent(self, answer: dict[str, Any]) -> torch.Tensor:
        assert "answer" in answer, answer
        return torch.load(self.cluster.alpha.folder / Path(answer["answer"]).name)

    def sample(self, mesh: list[int], **options: Any) -> torch.Tensor:
        return self.latent(self.ask("sample", CASE, path=self.path, mesh=mesh, **options))

    def sample_on_all(self) -> torch.Tensor:
        """Sample on whatever machines there are, as by the initializer's defaults."""
        inputs = {"GPU": 0, "ulysses_degree": 0, "ring_degree": 1}
        return self.latent(self.ask("sample_by", CASE, path=self.path, inputs=inputs))

    def assert_same(self, actual: torch.Tensor, tokens: list[int] | None = None) -> float:
        """Compare a latent with ComfyUI's own, and return the largest error over the standard deviation."""
        expected = self.stock(tokens)
        error = ((actual - expected).abs().max() / expected.std()).item()
        assert error <= TOLERANCE
        return error

    def stock(self, tokens: list[int] | None = None) -> torch.Tensor:
        """The same in ComfyUI alone."""
        key = None if tokens is None else tuple(tokens)
        if key not in self._expected:
            case = CASES[CASE] if key is None else replace(CASES[CASE], tokens=key)
            self._expected[key] = sample_stock(self.file, case, STEPS)
        return self._expected[key]

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
