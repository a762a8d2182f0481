"""What a worker imports before its first job."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from search_path import search_path

from raylight.host import settings

SCRIPT = """
import importlib, inspect, sys
from comfy.cli_args import args
given = dict(vars(args))
from raylight.host import comfy_patches, settings
from raylight.worker import boot
settings.apply(settings.HostSettings(given, {}), "cpu")
with comfy_patches.late_imports() as late:
    for module in boot.IMPORTS:
        importlib.import_module(module)
libraries = {"av", "scipy", "torchaudio", "torchsde", "torchvision", "transformers"} & set(sys.modules)
models = [name for name in sys.modules if name.startswith(("comfy.ldm.", "comfy.text_encoders."))]
print("libraries", sorted(libraries))
print("wan", "comfy.ldm.wan.model" in models, "flux", "comfy.text_encoders.flux" in models)
assert late.made
for module, name in late.made:
    try:
        found = getattr(importlib.import_module(module), name)
    except AttributeError:
        found = importlib.import_module(module + "." + name)
    kinds = inspect.isclass(found) or callable(found) or inspect.ismodule(found)
    if not kinds:
        print("neither called nor a module:", module, name)
import comfy.model_base, comfy.sd, comfy.ldm.wan.model, comfy.ldm.flux.model, comfy.ldm.flux.layers
assert comfy.ldm.wan.model.WanModel.__module__ == "comfy.ldm.wan.model"
assert comfy.sd.comfy.ldm.flux.model is sys.modules["comfy.ldm.flux.model"]
print("done")
"""


@pytest.mark.smoke
def test_a_worker_imports_models_and_their_libraries_late() -> None:
    """What ComfyUI imports by name from them can be a stand-in: it is called or asked for attributes."""
    environ = os.environ | {"PYTHONPATH": search_path(settings.python_path())}
    found = subprocess.run([sys.executable, "-c", SCRIPT], env=environ, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.split("\n")
    assert "libraries []" in lines and "wan False flux False" in lines
    assert "done" in lines and "neither" not in found.stdout, found.stdout
