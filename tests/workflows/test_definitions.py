"""Every template matches the nodes of ComfyUI and of this pack, and the committed files."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import own_pack
import pytest
from definitions import inputs_of, is_widget, widgets_of
from newest import of_the_newest
from PIL import Image

from raylight.dev.workflows.__main__ import FOLDER, text
from raylight.dev.workflows.signatures import SIGNATURES
from raylight.dev.workflows.table import TEMPLATES
from raylight.dev.workflows.template import Mode, Template
from raylight.dev.workflows.thumbnail import MOST_BYTES

OF_FRONTEND = {"MarkdownNote"}
FOLDERS = ("diffusion_models", "checkpoints", "text_encoders", "loras", "vae", "latent_upscale_models")
KINDS = {"INT": int, "FLOAT": (int, float), "FLOAT,INT": (int, float), "STRING": str, "BOOLEAN": bool}
# Not in any of ComfyUI's own templates.
ELSEWHERE = {"instantx_flux_canny.safetensors", "wan2.2_animate_14B_bf16.safetensors"}
# What a node names before the user has chosen; for LoadVideo, which ComfyUI brings no video for, nothing.
DEFAULTS = {("LoadImage.image", "example.png"), ("LoadVideo.file", "")}

each_template = pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)


@pytest.fixture(scope="module")
def definitions() -> dict[str, Any]:
    return own_pack.load_beside_stock_nodes()


@of_the_newest
@each_template
def test_nodes_match_definitions(template: Template, definitions: dict[str, Any]) -> None:
    for node in template.to_json()["nodes"]:
        if node["type"] in OF_FRONTEND:
            continue
        definition = definitions[node["type"]]
        where = f"{node['type']} {node['id']}"
        links = [(name, kind, optional) for name, kind, _, optional in inputs_of(definition) if not is_widget(kind)]
        places = [place for place in node["inputs"] if "widget" not in place]
        assert [(place["name"], place["type"], place.get("shape") == 7) for place in places] == links, where
        assert [place["name"] for place in places if place["link"] is None and place.get("shape") != 7] == [], where
        types = list(definition.RETURN_TYPES)
        names = list(getattr(definition, "RETURN_NAMES", None) or types)
        assert [(output["name"], output["type"]) for output in node["outputs"]] == list(
            zip(names, types, strict=True)
        ), where


@of_the_newest
@each_template
def test_widget_values_fit(template: Template, definitions: dict[str, Any]) -> None:
    for node in template.to_json()["nodes"]:
        if node["type"] in OF_FRONTEND:
            continue
        widgets = widgets_of(definitions[node["type"]])
        values = node["widgets_values"]
        assert len(values) == len(widgets), f"{node['type']}: {[name for name, *_ in widgets]} and {values}"
        files = {file["name"] for file in node["properties"].get("models", ())}
        for (name, kind, options), value in zip(widgets, values, strict=True):
            check_value(f"{node['type']}.{name}", kind, options, value, files)
        linked = {place["name"]: place["type"] for place in node["inputs"] if "widget" in place}
        assert linked.items() <= {name: kind for name, kind, _ in widgets if isinstance(kind, str)}.items()


def check_value(where: str, kind: Any, options: dict[str, Any], value: Any, files: set[str]) -> None:
    if isinstance(kind, list) or kind in ("COMBO", "COMFY_DYNAMICCOMBO_V3"):
        choices = kind if isinstance(kind, list) else options["options"]
        choices = [choice["key"] if isinstance(choice, dict) else choice for choice in choices]
        known = value in choices or (where, value) in DEFAULTS
        assert known or value in files, f"{where} = {value!r}, of {choices[:20]}"
        return
    assert isinstance(value, KINDS[kind]) and (kind == "BOOLEAN") == isinstance(value, bool), f"{where} = {value!r}"
    if kind in ("INT", "FLOAT"):
        assert options.get("min", value) <= value <= options.get("max", value), f"{where} = {value!r}"


@each_template
def test_links_match_their_ends(template: Template) -> None:
    content = template.to_json()
    nodes = {node["id"]: node for node in content["nodes"]}
    links = {link[0]: link for link in content["links"]}
    assert len(links) == len(content["links"]) and content["last_link_id"] == max(links)
    ends = {
        (link, node["id"], place)
        for node in nodes.values()
        for place, slot in enumerate(node["inputs"])
        if (link := slot["link"]) is not None
    }
    starts = {
        (link, node["id"], place)
        for node in nodes.values()
        for place, slot in enumerate(node["outputs"])
        for link in slot["links"]
    }
    assert ends == {(number, target, place) for number, _, _, target, place, _ in links.values()}
    assert starts == {(number, source, place) for number, source, place, *_ in links.values()}
    for _, source, start, target, place, kind in links.values():
        assert nodes[source]["outputs"][start]["type"] == kind == nodes[target]["inputs"][place]["type"]
        assert source < target, "nodes come in the order in which they run"


@each_template
def test_every_node_is_in_one_group(template: Template) -> None:
    content = template.to_json()
    boxes = [
        (
            node["id"],
            node["pos"][0],
            node["pos"][1] - 30,
            node["pos"][0] + node["size"][0],
            node["pos"][1] + node["size"][1],
        )
        for node in content["nodes"]
    ]
    groups = [
        (group["title"], x, y, x + width, y + height)
        for group in content["groups"]
        for x, y, width, height in [group["bounding"]]
    ]
    assert all(title for title, *_ in groups)
    for _, left, top, right, bottom in boxes:
        around = [g for g in groups if g[1] <= left and g[2] <= top and right <= g[3] and bottom <= g[4]]
        assert len(around) == 1
    for kind in (boxes, groups):
        for number, (_, left, top, right, bottom) in enumerate(kind):
            for _, left2, top2, right2, bottom2 in kind[number + 1 :]:
                assert right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top


@each_template
def test_note_has_degrees_memory_and_files(template: Template) -> None:
    content = template.to_json()
    (note,) = (node["widgets_values"][0] for node in content["nodes"] if node["type"] == "MarkdownNote")
    for count in (2, 4, 8):
        row = next(line for line in note.splitlines() if line.startswith(f"| {count} |"))
        assert "GiB" in row and "ulysses" in note
    files = [file for node in content["nodes"] for file in node.get("properties", {}).get("models", ())]
    assert files and all(file["name"] in note and file["url"] in note for file in files)


@of_the_newest
@each_template
def test_files_match_official_templates(template: Template) -> None:
    official = official_files()
    files = [file for node in template.to_json()["nodes"] for file in node.get("properties", {}).get("models", ())]
    for file in files:
        if file["name"] not in ELSEWHERE:
            assert (file["directory"], file["url"]) in official[file["name"]], file["name"]


def official_files() -> dict[str, set[tuple[str, str]]]:
    """Return folder and address of every model file that ComfyUI's own templates name, in metadata or in a note."""
    from comfyui_workflow_templates import get_asset_path, iter_templates

    found: dict[str, set[tuple[str, str]]] = {}
    for entry in iter_templates():
        try:
            content = Path(get_asset_path(entry.template_id, f"{entry.template_id}.json")).read_text("utf-8")
        except KeyError:
            continue
        for address in re.findall(r"https://huggingface\.co/[^\s\"')\\?]+\.safetensors", content):
            parts = address.split("/")
            folder = parts[-2] if "split_files" in parts else None
            for directory in (folder,) if folder else FOLDERS:
                found.setdefault(parts[-1], set()).add((directory, address))
    return found


def test_committed_files_are_current() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == {template.name for template in TEMPLATES}
    for template in TEMPLATES:
        committed = (FOLDER / f"{template.name}.json").read_text("utf-8")
        assert committed == text(template), f"{template.name}: run `make workflows`"
        assert json.loads(committed)["version"] == 0.4


def test_thumbnails() -> None:
    assert {path.stem for path in FOLDER.glob("*.jpg")} == {template.name for template in TEMPLATES}
    for path in FOLDER.glob("*.jpg"):
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.format == "JPEG" and picture.width == picture.height >= 256
            assert min(high - low for low, high in picture.getextrema()) > 100, "nothing is drawn"
        assert len(content) <= MOST_BYTES


def test_every_mode_and_node_is_used() -> None:
    assert {template.mode for template in TEMPLATES} == set(Mode)
    used = {node["type"] for template in TEMPLATES for node in template.to_json()["nodes"]}
    assert used == set(SIGNATURES)
