"""The command that starts Ray on a machine of a cluster."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from raylight.cluster import node


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """Return the commands that are run, with their environment; none is."""
    found: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
        found.append((command, env))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(node.subprocess, "run", run)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    return found


def test_a_head_makes_a_token_that_only_its_user_reads(
    started: list, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert node.main(["--head", "--address=127.0.0.1", "--", "--num-gpus=0"]) == 0
    token = tmp_path / ".ray" / "auth_token"
    assert len(token.read_text()) == 64 and stat.S_IMODE(token.stat().st_mode) == 0o600
    command, environment = started[0]
    assert command[1:4] == ["start", "--head", "--port=6379"]
    assert "--node-ip-address=127.0.0.1" in command and "--include-dashboard=false" in command
    assert command[-1] == "--num-gpus=0"
    assert environment["RAY_AUTH_MODE"] == "token" and environment["RAY_AUTH_TOKEN_PATH"] == str(token)
    comfyui, pack = environment["RAYLIGHT_PATH"].split(os.pathsep)
    assert (Path(comfyui) / "comfy").is_dir() and (Path(pack) / "raylight").is_dir()
    assert "--join 127.0.0.1:6379" in capsys.readouterr().out
    before = token.read_text()
    node.main(["--head", "--address=127.0.0.1"])
    assert token.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--join", "127.0.0.1:6379"], "this machine has no token of the cluster: copy"),
        (["--join", "127.0.0.1"], "write the host and the port of the head"),
        (["--head", "--comfyui", "/nowhere"], "there is no ComfyUI in /nowhere"),
        (["--head", "--model-paths", "/nowhere.yaml"], "there is no such file"),
    ],
)
def test_what_is_missing_is_named(
    arguments: list[str], message: str, started: list, capsys: pytest.CaptureFixture
) -> None:
    assert node.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert started == []
