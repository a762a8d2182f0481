"""Degrees that the initializers choose for inputs of 0, and how they report them."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

import nodes as comfy_nodes
from raylight.driver import options

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pack() -> dict[str, Any]:
    assert asyncio.run(comfy_nodes.load_custom_node(str(ROOT)))
    return comfy_nodes.NODE_CLASS_MAPPINGS


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of four GPUs."""
    monkeypatch.setattr(options, "default_worker_count", lambda: 4)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({}, (4, 4, 1, 1, 1)),
        ({"cfg_degree": 2}, (4, 2, 1, 2, 1)),
        ({"cfg_degree": 2, "ring_degree": 2}, (4, 1, 2, 2, 1)),
        ({"dp_degree": 4}, (4, 1, 1, 1, 4)),
        ({"dp_degree": 0}, (4, 4, 1, 1, 1)),
        ({"ulysses_degree": 1, "dp_degree": 0}, (4, 1, 1, 1, 4)),
        ({"ulysses_degree": 2, "ring_degree": 2}, (4, 2, 2, 1, 1)),
        ({"GPU": 8}, (8, 8, 1, 1, 1)),
        ({"GPU": 6, "cfg_degree": 2}, (6, 3, 1, 2, 1)),
        ({"GPU": 1}, (1, 1, 1, 1, 1)),
    ],
)
def test_chooses(four: None, inputs: dict[str, int], expected: tuple[int, ...]) -> None:
    found = options.degrees_from({"GPU": 0, "ulysses_degree": 0} | inputs)
    assert (found.mesh.world_size, found.ulysses, found.ring, found.cfg, found.dp) == expected


@pytest.mark.parametrize(
    ("inputs", "least", "grows", "by_run"),
    [
        ({}, (1, 1, 1), "ulysses", True),
        ({"ring_degree": 2}, (1, 2, 1), "ulysses", True),
        ({"cfg_degree": 2}, (2, 1, 1), "ulysses", False),
        ({"ulysses_degree": 2, "dp_degree": 0}, (1, 1, 2), "batch", False),
        ({"ulysses_degree": 2, "cfg_degree": 2}, (2, 1, 2), "", False),
    ],
)
def test_takes_what_a_cluster_has(
    four: None, inputs: dict[str, int], least: tuple[int, ...], grows: str, by_run: bool
) -> None:
    found = options.degrees_from({"GPU": 0, "ulysses_degree": 0, "ray_cluster_address": "host:6379"} | inputs)
    assert (found.mesh.batch, found.mesh.ring, found.mesh.ulysses) == least
    assert (found.grows, found.by_run) == (grows, by_run)


def test_takes_the_selected_gpus(four: None) -> None:
    found = options.degrees_from({"GPU": 0, "ulysses_degree": 0}, selected=(1, 3))
    assert (found.mesh.world_size, found.ulysses) == (2, 2)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"ring_degree": 3},
            r"ring_degree = 3 makes 3 workers, but GPU = 4 \(all that are there\): change the degrees so "
            "that their product divides 4, or GPU to 3",
        ),
        ({"cfg_degree": 2, "dp_degree": 4}, "cfg_degree = 2 x dp_degree = 4 makes 8 workers"),
        ({"ulysses_degree": 2}, r"makes 2 workers, but GPU = 4 \(all that are there\): set ulysses_degree to 0"),
        ({"ulysses_degree": 3, "dp_degree": 0}, "makes 3 workers, but GPU = 4 .*their product divides 4"),
        ({"ring_degree": 0}, "ring_degree = 0: at least 1"),
        ({"ulysses_degree": -1}, "ulysses_degree = -1: at least 1 and at most 64, or 0 for automatic"),
    ],
)
def test_rejects(four: None, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options.degrees_from({"GPU": 0, "ulysses_degree": 0} | inputs)


@pytest.mark.parametrize("address", ["", "  ", " local ", "Local", None, "None"])
def test_an_address_of_blanks_is_this_machine(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "gpu_count", lambda: 4)
    inputs = {"GPU": 5, "ulysses_degree": 5, "ray_cluster_address": address, "ray_cluster_namespace": ""}
    with pytest.raises(ValueError, match="GPU = 5, but this machine has 4"):
        options.config_from(inputs)
    assert options.config_from(inputs | {"GPU": 4, "ulysses_degree": 4})[0].is_local


def test_says_what_it_has_chosen(four: None) -> None:
    automatic = str(options.degrees_from({"GPU": 0, "ulysses_degree": 0, "cfg_degree": 2}))
    assert re.fullmatch(
        r"4 \w+( worker)?s: ulysses 2 x cfg 2 \(GPU and ulysses_degree chosen automatically\)", automatic
    )
    given = str(options.degrees_from({"GPU": 2, "ulysses_degree": 2}))
    assert given.endswith("ulysses 2")
    by_run = str(options.degrees_from({"GPU": 4, "ulysses_degree": 0}))
    assert by_run.endswith("s: degrees by the run (ulysses_degree chosen automatically)")
    with_ring = str(options.degrees_from({"GPU": 4, "ulysses_degree": 0, "ring_degree": 2}))
    assert with_ring.endswith("s: ring 2, other degrees by the run (ulysses_degree chosen automatically)")


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({}, True),
        ({"dp_degree": 0}, True),
        ({"ring_degree": 2}, True),
        ({"cfg_degree": 2}, False),
        ({"dp_degree": 2}, False),
        ({"ulysses_degree": 4}, False),
        ({"ulysses_degree": 1, "dp_degree": 0}, False),
        ({"GPU": 1}, False),
    ],
)
def test_each_run_chooses_what_is_not_given(four: None, inputs: dict[str, int], expected: bool) -> None:
    assert options.degrees_from({"GPU": 0, "ulysses_degree": 0} | inputs).by_run is expected


@pytest.mark.parametrize("node_id", ["RayInitializer", "RayInitializerAdvanced"])
def test_the_defaults_are_automatic_and_shown(pack: dict[str, Any], node_id: str) -> None:
    node = pack[node_id]
    defaults = {i.id: i.default if i.default is not None else i.options[0] for i in node.GET_SCHEMA().inputs}
    assert (defaults["GPU"], defaults["ulysses_degree"]) == (0, 0)
    output = asyncio.run(node.execute(**defaults))
    config = output.result[0].config
    assert config.by_run and config.world_size == config.mesh.ulysses
    assert "GPU and ulysses_degree chosen automatically" in output.ui.as_dict()["text"][0]
    assert "unique_id" in node.INPUT_TYPES()["hidden"]


def test_validation_leaves_what_only_the_run_knows(pack: dict[str, Any]) -> None:
    check = pack["RayInitializerAdvanced"].validate_inputs
    assert check(GPU=0, ulysses_degree=3, ring_degree=1, cfg_degree=1, dp_degree=1) is True
    assert check(GPU=4, ulysses_degree=0, ring_degree=1, cfg_degree=2, dp_degree=1) is True
    assert "divides 4" in check(GPU=4, ulysses_degree=0, ring_degree=3, cfg_degree=1, dp_degree=1)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"GPU": 1}, "sequence_attention = raylight_int8 has no effect: one worker exchanges nothing"),
        ({"ulysses_degree": 1, "cfg_degree": 2}, "except for batches that are too small for 2 groups of workers"),
        ({"ulysses_degree": 2}, ""),
        ({"ulysses_degree": 1, "ring_degree": 2}, ""),
        ({}, ""),
    ],
)
def test_an_exchange_in_8_bits_without_an_exchange_is_told(
    pack: dict[str, Any], inputs: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    node = pack["RayInitializerAdvanced"]
    for strategy in ("raylight_int8", "raylight"):
        caplog.clear()
        output = asyncio.run(node.execute(**({"GPU": 2, "sequence_attention": strategy} | inputs)))
        assert output.result[0].strategy == strategy
        text = output.ui.as_dict()["text"][0]
        wanted = words if strategy == "raylight_int8" else ""
        assert ("no effect" in text) == bool(wanted) and wanted in text
        assert any(wanted in message for message in caplog.messages) or not wanted
