"""The record of tested versions, and the report about other versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import versions
from newest import of_the_newest

from raylight.dev.setup.comfyui import VARIABLE


def test_normalized_names() -> None:
    lines = [
        "torch==2.14.1",
        "  Pillow",
        "pydantic_settings~=2.0",
        "",
        "#non essential dependencies:",
        "xfuser>=0.4.5",
        "pytest[x]>=8",
        "Pillow>=9",
    ]
    assert versions.names(lines) == ["pillow", "pydantic-settings", "pytest", "torch", "xfuser"]


@of_the_newest
def test_records_all_requirements() -> None:
    asked = versions.asked_for(Path(os.environ[VARIABLE]))
    assert {
        "torch",
        "torchvision",
        "transformers",
        "numpy",
        "ray",
        "safetensors",
        "pillow",
        "av",
        "pytest",
        "comfyui-frontend-package",
    } <= {*asked}
    recorded = versions.recorded(versions.FILE.read_text("utf-8"))
    assert {*asked} <= {*recorded}, "run `make versions`"


def test_round_trip() -> None:
    packages = {"a": "1.0+cpu", "b": "2"}
    assert versions.recorded(versions.text(packages, "0.30.0")) == packages
    assert versions.installed(["pytest", "no-such-package"]) == {"pytest": pytest.__version__}


def test_reports_only_differences() -> None:
    assert versions.differences({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "2.1", "d": "4"}) == [
        "b 2.1, tested with 2",
        "c is not here, tested with 3",
        "d 4, tested with none",
    ]
