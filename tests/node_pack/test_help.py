"""Every node has search aliases, and a help page with all of its inputs and outputs.

A deprecated node needs no page: its description says what to use, and ComfyUI makes a page of its tooltips.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import own_pack
import pytest
from own_pack import ROOT

import nodes as comfy_nodes


@pytest.fixture(scope="module")
def ours() -> dict[str, Any]:
    """The schemas of this pack's nodes by id."""
    found = {
        name: node
        for name, node in own_pack.load().items()
        if getattr(node, "RELATIVE_PYTHON_MODULE", None) == f"custom_nodes.{ROOT.name}"
    }
    assert len(found) >= 14
    return {name: schema for name, node in found.items() if not (schema := node.GET_SCHEMA()).is_deprecated}


@pytest.fixture(scope="module")
def pages(ours: dict[str, Any]) -> dict[str, str]:
    """The help pages that ComfyUI serves, by node id."""
    (folder,) = (path for path in comfy_nodes.EXTENSION_WEB_DIRS.values() if Path(path).is_relative_to(ROOT))
    return {path.stem: path.read_text("utf-8") for path in (Path(folder) / "docs").glob("*.md")}


def test_page_lists_all_inputs_and_outputs(ours: dict[str, Any], pages: dict[str, str]) -> None:
    for name, schema in ours.items():
        assert name in pages, f"nodes/web/docs/{name}.md is missing"
        page = pages[name]
        assert page.startswith(f"# {schema.display_name}\n"), name
        named = set(re.findall(r"`(\w+)`", page))
        wanted = {i.id for i in schema.inputs} | {output.display_name for output in schema.outputs}
        assert wanted - named == set(), name


def test_page_lists_no_unknown_input(ours: dict[str, Any], pages: dict[str, str]) -> None:
    known = {i.id for schema in ours.values() for i in schema.inputs}
    known |= {output.display_name for schema in ours.values() for output in schema.outputs}
    for name in ours:
        items = re.findall(r"^- ((?:`\w+`(?:, )?)+):", pages[name], re.MULTILINE)
        assert items, name
        assert {word for item in items for word in re.findall(r"`(\w+)`", item)} <= known, name


def test_tooltips_and_search_aliases(ours: dict[str, Any]) -> None:
    for name, schema in ours.items():
        assert schema.search_aliases and schema.description, name
        assert [i.id for i in schema.inputs if not i.tooltip] == [], name
        assert [output.display_name for output in schema.outputs if not output.tooltip] == [], name


def test_folder_has_pages_and_scripts() -> None:
    files = [path for path in (ROOT / "nodes" / "web").rglob("*") if path.is_file()]
    assert sorted(path.name for path in files if path.suffix != ".md") == ["early_ray.js", "saved_workflows.js"]
