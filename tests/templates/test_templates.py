"""Official workflow templates, converted by ComfyUI's frontend, run as they are and with the loader replaced."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raylight.dev.demo.comfy_server import ComfyServer
from raylight.dev.demo.graphs import Graph

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))

import chromium
import official
from compared import compare, hold_together, run
from files import ALL_FOLDERS, write_media, write_models
from official_names import UnknownFile
from rewrite import on_workers, probed, shrunk

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DEFAULT = "video_wan2_2_14B_t2v flux_dev_full_text_to_image image_qwen_image hunyuan_video_text_to_video"
# Any others: RAYLIGHT_TEST_TEMPLATES="flux_kontext_dev_basic video_wan2_2_14B_i2v"
NAMES = os.environ.get("RAYLIGHT_TEST_TEMPLATES", DEFAULT).split()
BOTH = os.environ.get("RAYLIGHT_TEST_TEMPLATES_STOCK")  # to test the tests: both runs by stock nodes


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    found = chromium.find()
    if found is None:
        pytest.skip("ComfyUI's frontend needs a browser: install Chromium, or name one in " + chromium.VARIABLE)
    work = tmp_path_factory.mktemp("templates")
    paths = {folder: work / "models" / folder for folder in ALL_FOLDERS}
    for path in paths.values():
        path.mkdir(parents=True)
    with ComfyServer(
        work,
        model_paths=paths | {"custom_nodes": HERE / "packs"},
        extra_args=["--cpu", "--force-fp32", "--fp32-vae", "--fp32-text-enc"],
    ) as running:
        yield running


@pytest.fixture(scope="module")
def prompts(server: ComfyServer) -> dict[str, Graph]:
    """Convert all templates at once: a page that shows one redraws it constantly, which takes a core from the runs."""
    with chromium.Page(chromium.find()) as page:
        frontend = official.Frontend(server, page)
        return {name: frontend.prompt(official.workflow(name)) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_template_on_workers(
    name: str, server: ComfyServer, prompts: dict[str, Graph], report_parity: Callable[[str], None]
) -> None:
    description = server.object_info()
    template = shrunk(prompts[name], description)
    strangers = {entry["class_type"] for entry in template.values()} - set(description)
    if strangers:
        pytest.skip(f"this ComfyUI has no {', '.join(sorted(strangers))}")
    written: list[Path] = []
    try:
        written += write_models(template, server.work_dir / "models")
    except UnknownFile as error:
        pytest.skip(str(error))
    write_media(template, server.directory("input"))
    try:
        expected = run(server, probed(template, description, f"{name}-stock"))
        server.free()
        ours = template if BOTH else on_workers(template)
        actual = run(server, probed(ours, description, f"{name}-ray"))
    finally:
        server.free()
        for path in written:
            path.unlink()
    assert expected and [kind for kind, _ in actual] == [kind for kind, _ in expected]
    hold_together(actual)
    both = zip(actual, expected, strict=True)
    report_parity(f"{name:40} " + "  ".join(compare(kind, a, e) for (kind, a), (_, e) in both))
