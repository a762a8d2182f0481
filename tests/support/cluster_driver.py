"""ComfyUI's process on a machine of a cluster, for tests: a request in JSON on each line of input, and its answer.

`python cluster_driver.py ADDRESS MODEL_FOLDER PACK_FOLDER`, and then, say, {"sample": "Wan T2V", "path": "...",
"mesh": [1, 1, 2]}.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "support"), os.environ["COMFYUI_PATH"], str(ROOT)]

import torch
from comfy.cli_args import args

args.cpu = True
torch.set_num_threads(1)

import comfy.model_management
import folder_paths
from comfy_cases import CASES, sample_on_workers

from raylight.cluster import active_session
from raylight.cluster.config import SessionConfig
from raylight.driver import status
from raylight.driver.options import workers_from
from raylight.host.recipe import REPLICATED, ModelRecipe, RayModel, WorkerConfig
from raylight.parallel.mesh import MeshShape

STEPS = 3


class Driver:
    """Answers requests. Each is a verb with its value, and options."""

    def __init__(self, address: str) -> None:
        self.address = address

    def sample(
        self,
        case: str,
        path: str,
        mesh: list[int],
        sharding: str = REPLICATED,
        by_run: bool = False,
        steps: int = STEPS,
        tokens: list[int] | None = None,
        pack: str = "",
    ) -> str:
        """Sample a case, and return the path of its latent. `pack` is the folder of ComfyUI-GGUF, if there is one."""
        config = SessionConfig(MeshShape(*mesh), "cpu", self.address, by_run=by_run, start_timeout_s=90)
        workers = WorkerConfig(config, "TORCH_FLASH", sharding=sharding)
        return self._sample(workers, case, path, steps, tokens, pack)

    def sample_by(self, case: str, path: str, inputs: dict[str, Any], steps: int = STEPS) -> str:
        """Sample with the workers of an initializer's inputs."""
        inputs = {
            "ray_cluster_address": self.address,
            "ray_cluster_namespace": "",
            "XFuser_attention": "TORCH",
        } | inputs
        return self._sample(workers_from(inputs)[0], case, path, steps, None)

    def _sample(
        self, workers: WorkerConfig, case: str, path: str, steps: int, tokens: list[int] | None, pack: str = ""
    ) -> str:
        one = CASES[case] if tokens is None else replace(CASES[case], tokens=tuple(tokens))
        recipe = ModelRecipe.of(path, "default", workers.sharding, gguf_pack=pack)
        latent = sample_on_workers(RayModel(workers, recipe), one, steps)
        target = Path(os.environ["TMPDIR"]) / f"latent-{time.monotonic_ns()}.pt"
        torch.save(latent, target)
        return str(target)

    def places(self, _: Any) -> list[str]:
        """Return where the ranks run."""
        running = active_session.running()
        return [] if running is None else [str(place) for place in running.places.values()]

    def status(self, _: Any) -> str:
        """Return the text of Raylight Status."""
        return status.overview()

    def close(self, _: Any) -> None:
        """End the workers and leave the cluster."""
        active_session.close()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no answer
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    # As by ComfyUI's button.
    signal.signal(signal.SIGUSR1, lambda *_: comfy.model_management.interrupt_current_processing())
    folder_paths.add_model_folder_path("diffusion_models", sys.argv[2])
    folder_paths.add_model_folder_path("custom_nodes", sys.argv[3])
    driver = Driver(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        verb = next(iter(request))
        began = time.monotonic()
        try:
            answer = {"answer": getattr(driver, verb)(request.pop(verb), **request)}
        except (Exception, comfy.model_management.InterruptProcessingException) as error:
            logging.exception("%s failed", verb)
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps({**answer, "seconds": time.monotonic() - began}) + "\n")
        answers.flush()
    active_session.close()


if __name__ == "__main__":
    main()
