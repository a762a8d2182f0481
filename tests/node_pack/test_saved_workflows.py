"""Saved workflows open with each value at its input, and are valid."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import execution
import folder_paths
import own_pack
import pytest
import saved
from definitions import widgets_of


@pytest.fixture(scope="module")
def definitions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    files = tmp_path_factory.mktemp("models")
    folders = {"diffusion_models": saved.MODEL, "loras": saved.LORA, "text_encoders": saved.CLIP}
    with pytest.MonkeyPatch.context() as patch:
        for folder, name in folders.items():
            (files / folder).mkdir()
            (files / folder / name).touch()
            paths, extensions = folder_paths.folder_names_and_paths[folder]
            patch.setitem(folder_paths.folder_names_and_paths, folder, ([*paths, str(files / folder)], extensions))
        yield own_pack.load_beside_stock_nodes()


def opened(workflow: dict[str, Any], definitions: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the frontend's prompt: values go to widgets by position, and links to inputs by name."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        names = [name for name, *_ in widgets_of(definitions[node["type"]])]
        inputs = dict(zip(names, node["widgets_values"], strict=False))
        defaults = {name: options.get("default") for name, _, options in widgets_of(definitions[node["type"]])}
        inputs = {name: inputs.get(name, defaults[name]) for name in names if name != "control_after_generate"}
        inputs |= {slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


@pytest.mark.parametrize("initializer", saved.MEANING)
def test_saved_workflow_is_valid(definitions: dict[str, Any], initializer: str) -> None:
    prompt = opened(saved.workflow(initializer), definitions)
    assert saved.MEANING[initializer].items() <= prompt["1"]["inputs"].items()
    valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt("old", prompt, None))
    assert valid, (error, node_errors)
    assert outputs == ["8"]


def test_wrong_value_is_invalid(definitions: dict[str, Any]) -> None:
    """Show that the test above can fail."""
    prompt = opened(saved.workflow("RayInitializer"), definitions)
    prompt["1"]["inputs"]["GPU"] = 3
    valid, _, _, node_errors = asyncio.run(execution.validate_prompt("old", prompt, None))
    assert not valid and "makes 2 workers, but GPU = 3" in str(node_errors["1"])
