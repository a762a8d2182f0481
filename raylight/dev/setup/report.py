"""Output of the set-up: one line per step, and failures with a remedy."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

TAIL_LINES = 20


class SetupError(Exception):
    """An expected failure, shown without a traceback. Its text has the cause and the remedy."""


def say(line: str) -> None:
    print(f"raylight: {line}", flush=True)


def run_tool(command: list[str], *, log: Path, failure: str) -> None:
    """Run a command with its output in `log`. Raises SetupError: it failed; with `failure` and the output's end."""
    # The user's own configuration may set --user, which pip refuses inside a virtual environment.
    environ = os.environ | {"PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environ).returncode
    if code != 0:
        raise SetupError(f"{failure}\n\nThe last lines of its output ({log}):\n{tail(log)}")


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    return "\n".join("  " + line for line in log.read_text("utf-8", errors="replace").splitlines()[-lines:])
