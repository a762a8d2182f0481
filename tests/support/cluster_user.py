"""ComfyUI's process on the first machine of a cluster, as tests use it."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import machines
import torch
from comfy_cases import CASES, checkpoint, sample_stock

STEPS = 3
CASE = "Wan T2V"


class ClusterUser:
    """ComfyUI's process on alpha. The model file is in a model folder of alpha."""

    def __init__(self, cluster: machines.FakeCluster) -> None:
        self.cluster = cluster
        folder = cluster.alpha.folder / cluster.alpha.models
        self.file = checkpoint(folder, CASES[CASE])
        self.path = str(cluster.alpha.here / cluster.alpha.models / self.file.name)
        self._process = cluster.python("cluster_driver.py", cluster.address)
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

    def latent(self, answer: dict[str, Any]) -> torch.Tensor:
        assert "answer" in answer, answer
        return torch.load(self.cluster.alpha.folder / Path(answer["answer"]).name)

    def sample(self, mesh: list[int], **options: Any) -> torch.Tensor:
        folder = str(self.cluster.alpha.here / self.cluster.alpha.models)
        return self.latent(self.ask("sample", CASE, path=self.path, mesh=mesh, folder=folder, **options))

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
