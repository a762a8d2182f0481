"""ComfyUI's frontend in a headless Chromium: Raylight's templates in its menu, and runs started there."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import saved
from newest import of_the_newest

from raylight.dev.demo.comfy_server import ComfyServer
from raylight.dev.workflows.table import TEMPLATES

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent / "templates")]

import chromium
from chromium import BrowserError
from events import listen, watch
from files import write_models
from person import Person

pytestmark = [of_the_newest, pytest.mark.slow, pytest.mark.timeout(1200)]

PACKS = HERE.parent / "templates" / "packs"
FOLDERS = ("diffusion_models", "text_encoders", "vae", "loras", "controlnet")
RUN = {"width": 128, "height": 128, "steps": 8}
PATIENCE = 300.0
OPEN_MENU = "window.app.extensionManager.command.execute('Comfy.BrowseTemplates')"
CARD = '[data-testid="template-workflow-{}"]'
ANY_CARD = '[data-testid^="template-workflow-"]'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A ComfyUI with a file for each name in the templates; those of Flux can be run."""
    if chromium.find() is None:
        pytest.skip("ComfyUI's frontend needs a browser: install Chromium, or name one in " + chromium.VARIABLE)
    work = tmp_path_factory.mktemp("browser")
    paths = {folder: work / "models" / folder for folder in FOLDERS}
    for path in paths.values():
        path.mkdir(parents=True)
    for template in TEMPLATES:
        for node in template.to_json()["nodes"]:
            for file in node["properties"].get("models", ()):
                (paths[file["directory"]] / file["name"]).touch()
    for folder, name in (("diffusion_models", saved.MODEL), ("loras", saved.LORA), ("text_encoders", saved.CLIP)):
        (paths[folder] / name).touch()
    write_models(flux_files(), work / "models")
    (work / "input").mkdir()
    example = Path(os.environ["COMFYUI_PATH"]) / "input" / "example.png"
    shutil.copy(example, work / "input")
    with ComfyServer(
        work,
        model_paths=paths | {"custom_nodes": PACKS},
        extra_args=["--cpu", "--force-fp32", "--fp32-vae", "--fp32-text-enc", "--preview-method", "latent2rgb"],
    ) as running:
        yield running


@pytest.fixture(scope="module")
def person(server: ComfyServer, request: pytest.FixtureRequest) -> Iterator[Person]:
    """A user of ComfyUI in a separate browser."""
    with chromium.Page(chromium.find()) as page:
        someone = Person(page, request.config.getoption("--screenshots"))
        someone.open(f"http://127.0.0.1:{server.port}/")
        yield someone


def flux_files() -> dict[str, Any]:
    """Return the loaders of the Flux templates, for the code that writes the files of a prompt."""
    return {
        str(node["id"]): {
            "class_type": node["type"],
            "inputs": {
                name: file["name"]
                for name, file in zip(
                    ("clip_name1", "clip_name2") if len(node["properties"]["models"]) > 1 else (names[node["type"]],),
                    node["properties"]["models"],
                    strict=True,
                )
            },
        }
        for names in [{"RayUNETLoader": "unet_name", "VAELoader": "vae_name", "DualCLIPLoader": "clip_name1"}]
        for node in workflow("flux-dev-usp")["nodes"]
        if node["properties"].get("models")
    }


def workflow(name: str) -> dict[str, Any]:
    return next(template for template in TEMPLATES if template.name == name).to_json()


def open_menu(person: Person) -> None:
    person.page.evaluate(OPEN_MENU)
    person.click("[role=dialog] span", "raylight")


def see_thumbnail(person: Person, card: str) -> None:
    """Wait until a card of the menu shows its picture.

    The frontend loads cards that come into view, but may miss some while it builds the menu; scrolling away and back
    helps.
    """
    for patience in (10.0, 20.0, 30.0, 60.0):
        person.find(card)
        try:
            person.page.wait_for(f"document.querySelector('{card} img')?.naturalWidth >= 256", timeout=patience)
            return
        except BrowserError:
            if patience == 60.0:
                raise
            for end in ("at(0)", "at(-1)"):
                person.page.evaluate(f"[...document.querySelectorAll('{ANY_CARD}')].{end}.scrollIntoView()")
                time.sleep(0.5)


def see_image(person: Person) -> None:
    """Wait until the node that saves the image shows it."""
    person.page.wait_for(
        f"window.app.graph.nodes.some((n) => n.type === 'SaveImage' && n.imgs?.[0]?.naturalWidth === {RUN['width']})",
        timeout=PATIENCE,
    )


def test_menu_shows_all_templates(person: Person) -> None:
    open_menu(person)
    for template in TEMPLATES:
        card = CARD.format(template.name)
        see_thumbnail(person, card)
    person.look("menu")
    person.click('[aria-label="Close dialog"]')


def test_templates_open_without_errors(person: Person) -> None:
    for template in TEMPLATES:
        open_menu(person)
        person.click(CARD.format(template.name))
        expected = sorted(node["type"] for node in template.to_json()["nodes"])
        person.page.wait_for(f"document.title.includes({json.dumps(template.name)})", timeout=PATIENCE)
        person.page.wait_for(
            f"JSON.stringify(window.app.graph.nodes.map((n) => n.type).sort()) === JSON.stringify({expected})",
            timeout=PATIENCE,
        )
        time.sleep(0.3)  # the frontend checks files after it has loaded the graph
        assert person.problems() == [], template.name
        person.look(f"template-{template.name}")


@pytest.mark.parametrize("initializer", saved.MEANING)
def test_saved_workflow_opens(person: Person, initializer: str) -> None:
    person.load(saved.workflow(initializer), f"old-{initializer}")
    values = person.page.evaluate(f"""Object.fromEntries(window.app.graph.nodes.find(
        (n) => n.type === "{initializer}").widgets.map((widget) => [widget.name, widget.value]))""")
    assert saved.MEANING[initializer].items() <= values.items()
    assert person.problems() == []


def test_errors_are_detected(person: Person) -> None:
    broken = workflow("flux-dev-usp")
    broken["nodes"][1]["type"] = "NoSuchNode"
    broken["nodes"][2]["widgets_values"][0] = "no-such-file.safetensors"
    person.load(broken, "broken")
    person.find('[data-testid="error-overlay"]')
    expected = {"no node NoSuchNode", "red: RayUNETLoader", "RayUNETLoader.unet_name = no-such-file.safetensors"}
    deadline = time.monotonic() + PATIENCE
    while not expected <= set(found := person.problems()):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    person.click('[data-testid="error-overlay-dismiss"]')


def test_run_shows_progress_preview_and_image(person: Person, server: ComfyServer) -> None:
    person.load(workflow("flux-dev-usp"), "run")
    person.set_widgets(**RUN)
    person.view(0.6, (-700, 60))
    listen(person)
    person.click('[data-testid="queue-button"]')
    run = watch(person, PATIENCE, look="run")
    assert run.end["kind"] == "execution_success", run.end
    assert [message["value"] for message in run.of("progress")] == list(range(1, RUN["steps"] + 1))
    # The machine decides how many of the steps a page draws; they have to come in order.
    assert len(run.bars) >= 2 and run.bars == sorted(run.bars), "the bar in the node moves"
    assert [title for title in run.titles if "%" in title and "XFuserKSamplerAdvanced" in title]
    assert len(run.of("b_preview_with_metadata")) >= 2 and run.pictures["XFuserKSamplerAdvanced"]
    see_image(person)
    person.view(0.75, (-1050, 60))
    person.look("image")
    person.view(0.9, (-560, 60))
    person.look("initializer")
    assert list(server.directory("output").glob("raylight/flux-dev*.png"))


def test_initializer_shows_choice(person: Person) -> None:
    texts = person.page.evaluate(
        "window.app.graph.nodes.find((n) => n.type === 'RayInitializer').widgets.map((w) => String(w.value))"
    )
    assert any("ulysses" in text and "GPU and ulysses_degree chosen automatically" in text for text in texts)


def test_cancel_ends_run(person: Person, server: ComfyServer) -> None:
    person.set_widgets(steps=2000, noise_seed=5)
    listen(person)
    person.click('[data-testid="queue-button"]')
    watch(person, PATIENCE, until=lambda run: len(run.of("progress")) > 2 or run.end is not None)
    person.look("before-cancel")
    person.click('[aria-label="Cancel current run"]')
    run = watch(person, 60.0)
    assert run.end["kind"] == "execution_interrupted", run.end
    assert run.of("progress")[-1]["value"] < 1900
    queue = server.queue()
    assert not queue.running and not queue.pending
    person.look("after-cancel")


def test_drag_drop_in_loader_into_stock_workflow(person: Person, server: ComfyServer) -> None:
    stock = copy.deepcopy(workflow("flux-dev-dropin"))
    for node in stock["nodes"]:
        if node["type"] == "RayModelLoader":
            node.update(type="UNETLoader", inputs=[], title="Load Diffusion Model")
            node["outputs"][0]["name"] = "MODEL"
    person.load(stock, "stock")
    person.set_widgets(**RUN, seed=3)
    person.view(0.7, (-200, 220))
    person.look("stock")

    title = "window.app.graph.nodes.find((n) => n.type === 'UNETLoader').pos"
    person.click_at(person.on_canvas(f"[{title}[0] + 120, {title}[1] - 12]"))
    person.press("Delete", 46)
    person.page.wait_for("!window.app.graph.nodes.some((n) => n.type === 'UNETLoader')", timeout=PATIENCE)

    person.click('[aria-label="Node Library (n)"]')
    person.click(".side-bar-panel input")
    person.type("as MODEL (Ray)")
    entry = person.find(".side-bar-panel [role=treeitem]", "Load Diffusion Model as MODEL (Ray)")
    free = person.on_canvas("window.app.graph.nodes.find((n) => n.type === 'EmptySD3LatentImage').pos")
    person.drag(entry, (free[0], free[1] + 150))
    loader = "window.app.graph.nodes.find((n) => n.type === 'RayModelLoader')"
    person.page.wait_for(f"!!{loader}", timeout=PATIENCE)
    person.click('[aria-label="Node Library (n)"]')

    sampler = "window.app.graph.nodes.find((n) => n.type === 'KSampler')"
    person.page.wait_for(
        "![...document.querySelectorAll('.side-bar-panel input')].some((e) => e.getClientRects().length)",
        timeout=PATIENCE,
    )  # closed
    person.drag(person.on_canvas(f"[...{loader}.getOutputPos(0)]"), person.on_canvas(f"[...{sampler}.getInputPos(0)]"))
    person.page.wait_for(f"{sampler}.getInputNode(0) === {loader}", timeout=PATIENCE)
    person.set_widgets(unet_name="flux1-dev.safetensors")
    assert person.problems() == []

    listen(person)
    person.click('[data-testid="queue-button"]')
    run = watch(person, PATIENCE, look="dropin")
    assert run.end["kind"] == "execution_success", run.end
    assert run.of("b_preview_with_metadata") and "no Ray initializer: " in server.log.read_text("utf-8")
    see_image(person)
    assert list(server.directory("output").glob("raylight/flux-dropin*.png"))
    person.look("dropin-image")


def test_help_page_opens(person: Person) -> None:
    person.load(workflow("flux-dev-usp"), "help")
    person.view(0.6, (-300, 400))
    person.page.evaluate(
        "window.app.canvas.selectNode(window.app.graph.nodes.find((n) => n.type === 'RayInitializer'))"
    )
    time.sleep(1.0)  # the buttons above a node appear after it is drawn
    person.click('[data-testid="info-button"]')
    person.look("help-button")
    person.find("h1", "Ray Initializer")
    person.find("h2", "How many, and how")
    person.look("help")
