"""Quantised files on two machines that share their weights: the result of one ComfyUI, and as few bytes on the link as
in the file.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import gguf_cases
import gguf_files
import pytest
import quantised
import torch
from cluster_user import CASE, STEPS, TOLERANCE, ClusterUser
from comfy_cases import CASES, sample, sample_stock

pytestmark = pytest.mark.slow
EQUAL = (11, 11)  # prompts of one length, which ComfyUI computes as one batch: one forward a step
PACK = "ComfyUI-GGUF"


class Sharded:
    """A file of alpha, sampled with its weights sharded over both machines."""

    def __init__(self, user: ClusterUser, path: Path, pack: str = "") -> None:
        self._user, self._alpha = user, user.cluster.alpha
        self.options = {"path": str(self._alpha.here / self._alpha.models / path.name), "mesh": [2, 1, 1]}
        self.options |= {"sharding": "sharded", "tokens": EQUAL, "pack": pack}

    def ask(self) -> torch.Tensor:
        return self._user.latent(self._user.ask("sample", CASE, **self.options))

    def error(self) -> str:
        return self._user.ask("sample", CASE, **self.options)["error"]

    def compare(self, expected: torch.Tensor, gathered_bytes: int) -> float:
        """Assert that the latent is the expected one, and that a run sends half of what is gathered and no more.
        Return the error.
        """
        self.ask()  # which may send the file
        before = self._alpha.sent_bytes()
        actual = self.ask()
        sent = self._alpha.sent_bytes() - before
        assert 1 <= sent / (STEPS * gathered_bytes / 2) < 1.1
        error = ((actual - expected).abs().max() / expected.std()).item()
        assert error <= TOLERANCE
        return error


def test_fp8_that_is_sent(user: ClusterUser, report_parity) -> None:
    alpha = user.cluster.alpha
    path = alpha.folder / alpha.models / "fp8.safetensors"
    quantised.quantise(user.file, path, "float8_e4m3fn")
    expected = sample_stock(path, replace(CASES[CASE], tokens=EQUAL), STEPS)
    error = Sharded(user, path).compare(expected, quantised.gathered_bytes(path, 2))
    report_parity(f"two machines, FSDP, scaled fp8{'':<24} max error {error:.1e} of the standard deviation")
    assert [one.read_bytes() for one in user.sent_to_beta(path.name)] == [path.read_bytes()]


def test_gguf_in_the_folders_of_each_machine(user: ClusterUser, report_parity) -> None:
    alpha, beta = user.cluster.alpha, user.cluster.beta
    path = alpha.folder / alpha.models / "q8.gguf"
    gguf_files.write_gguf(user.file, path, "Q8_0", "wan", rest="F32")
    shutil.copy(path, beta.folder / beta.models)
    expected = sample(gguf_cases.stock(path), replace(CASES[CASE], tokens=EQUAL), STEPS)
    shutil.copytree(gguf_files.PACK, alpha.folder / alpha.packs / PACK)
    sharded = Sharded(user, path, str(alpha.here / alpha.packs / PACK))
    before = user.ask("places")
    assert "the machine beta has no ComfyUI-GGUF, and GGUF files need there what ComfyUI has in" in sharded.error()
    there = Path(shutil.copytree(gguf_files.PACK, beta.folder / beta.packs / PACK)) / "dequant.py"
    there.write_text(there.read_text() + "\n# of another version\n")
    error = sharded.error()
    assert "the machine beta has another version of ComfyUI-GGUF" in error
    assert str(beta.here / beta.packs / PACK / there.name) in error
    shutil.copy(Path(gguf_files.PACK) / there.name, there)
    worst = sharded.compare(expected, gguf_files.gathered_bytes(path, 2))
    report_parity(f"two machines, FSDP, GGUF{'':<30} max error {worst:.1e} of the standard deviation")
    assert not user.sent_to_beta(path.name)
    assert user.ask("places")["answer"] == before["answer"], "the workers stay"
