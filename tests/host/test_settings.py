"""ComfyUI's command line as a worker has it."""

from __future__ import annotations

import os
import subprocess
import sys

from search_path import search_path

from raylight.host import settings

SCRIPT = """
import sys
from raylight.host import settings
given = {"disable_cuda_graphs": False, "disable_comfy_compiler": False, "fast": {"a"}}
settings.apply(settings.HostSettings(given, {}), "cpu")
from comfy.cli_args import args
print(args.disable_cuda_graphs, args.disable_comfy_compiler, args.cpu, args.fast)
"""


def test_a_worker_has_the_command_line_without_cuda_graphs_of_comfyui() -> None:
    environ = os.environ | {"PYTHONPATH": search_path(settings.python_path())}
    found = subprocess.run([sys.executable, "-c", SCRIPT], env=environ, capture_output=True, text=True, check=True)
    assert found.stdout.split("\n")[-2] == "True True True {'a'}"
