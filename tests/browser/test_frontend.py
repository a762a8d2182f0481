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
from raylight.dev.workflows.notes import FOLDERS
from raylight.dev.workflows.table import TEMPLATES

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent / "templates")]

import chromium
from browser_user import User
from chromium import BrowserError
from events import listen, watch
from files import write_models

pytestmark = [of_the_newest, pytest.mark.slow, pytest.mark.timeout(1200)]

PACKS = HERE.parent / "templates" / "packs"
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
    write_models(flux_files(), work / "models")
    for template in TEMPLATES:
        for node in template.to_json()["nodes"]:
            for file in node["properties"].get("models", ()):
                (paths[file["directory"]] / file["name"]).touch()
    for folder, name in (("diffusion_models", saved.MODEL), ("loras", saved.LORA), ("text_encoders", saved.CLIP)):
        (paths[folder] / name).touch()
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
def user(server: ComfyServer, request: pytest.FixtureRequest) -> Iterator[User]:
    """A user of ComfyUI in a separate browser."""
    with chromium.Page(chromium.find()) as page:
        someone = User(page, request.config.getoption("--screenshots"))
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
        for names in [{"RayUNETLoader": "unet_name", "RayVAELoaderAsVAE": "vae_name", "DualCLIPLoader": "clip_name1"}]
        for node in workflow("flux-dev-usp")["nodes"]
        if node["properties"].get("models")
    }


def workflow(name: str) -> dict[str, Any]:
    return next(template for template in TEMPLATES if template.name == name).to_json()


def open_menu(user: User) -> None:
    user.page.evaluate(OPEN_MENU)
    user.click("[role=dialog] span", "raylight")


def see_thumbnail(user: User, card: str) -> None:
    """Wait until a card of the menu shows its picture.

    The frontend loads cards that come into view, but may miss some while it builds the menu; scrolling away and back
    helps.
    """
    for patience in (10.0, 20.0, 30.0, 60.0):
        user.find(card)
        try:
            user.page.wait_for(f"document.querySelector('{card} img')?.naturalWidth >= 256", timeout=patience)
            return
        except BrowserError:
            if patience == 60.0:
                raise
            for end in ("at(0)", "at(-1)"):
                user.page.evaluate(f"[...document.querySelectorAll('{ANY_CARD}')].{end}.scrollIntoView()")
                time.sleep(0.5)


def see_image(user: User) -> None:
    """Wait until the node that saves the image shows it."""
    user.page.wait_for(
        f"window.app.graph.nodes.some((n) => n.type === 'SaveImage' && n.imgs?.[0]?.naturalWidth === {RUN['width']})",
        timeout=PATIENCE,
    )


def test_menu_shows_all_templates(user: User) -> None:
    open_menu(user)
    for template in TEMPLATES:
        card = CARD.format(template.name)
        see_thumbnail(user, card)
    user.look("menu")
    user.click('[aria-label="Close dialog"]')


def test_ray_starts_when_a_workflow_with_its_nodes_is_opened(user: User, server: ComfyServer) -> None:
    def log() -> str:
        return server.log.read_text("utf-8", errors="replace")

    assert "starting Ray" not in log(), "no workflow with its nodes was opened"
    user.load(workflow("flux-dev-usp"), "early")
    deadline = time.monotonic() + PATIENCE
    while "Ray is ready to start workers" not in log():
        assert time.monotonic() < deadline, log()
        time.sleep(0.2)
    assert "workers ready" not in log(), "they take memory of GPUs"


def test_templates_open_without_errors(user: User) -> None:
    for template in TEMPLATES:
        open_menu(user)
        user.click(CARD.format(template.name))
        expected = sorted(node["type"] for node in template.to_json()["nodes"])
        user.page.wait_for(f"document.title.includes({json.dumps(template.name)})", timeout=PATIENCE)
        user.page.wait_for(
            f"JSON.stringify(window.app.graph.nodes.map((n) => n.type).sort()) === JSON.stringify({expected})",
            timeout=PATIENCE,
        )
        time.sleep(0.3)  # the frontend checks files after it has loaded the graph
        assert user.problems() == [], template.name
        user.look(f"template-{template.name}")


@pytest.mark.parametrize("initializer", saved.MEANING)
def test_saved_workflow_opens(user: User, initializer: str) -> None:
    user.load(saved.workflow(initializer), f"old-{initializer}")
    values = user.page.evaluate(f"""Object.fromEntries(window.app.graph.nodes.find(
        (n) => n.type === "{initializer}").widgets.map((widget) => [widget.name, widget.value]))""")
    assert saved.MEANING[initializer].items() <= values.items()
    assert user.problems() == []


def test_errors_are_detected(user: User) -> None:
    broken = workflow("flux-dev-usp")
    broken["nodes"][1]["type"] = "NoSuchNode"
    broken["nodes"][2]["widgets_values"][0] = "no-such-file.safetensors"
    user.load(broken, "broken")
    user.find('[data-testid="error-overlay"]')
    expected = {"no node NoSuchNode", "red: RayUNETLoader", "RayUNETLoader.unet_name = no-such-file.safetensors"}
    deadline = time.monotonic() + PATIENCE
    while not expected <= set(found := user.problems()):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    user.click('[data-testid="error-overlay-dismiss"]')


def test_run_shows_progress_preview_and_image(user: User, server: ComfyServer) -> None:
    user.load(workflow("flux-dev-usp"), "run")
    user.set_widgets(**RUN)
    user.view(0.6, (-700, 60))
    listen(user)
    user.click('[data-testid="queue-button"]')
    run = watch(user, PATIENCE, look="run")
    assert run.end["kind"] == "execution_success", run.end
    assert [message["value"] for message in run.of("progress")] == list(range(1, RUN["steps"] + 1))
    # The machine decides how many of the steps a page draws; they have to come in order.
    assert len(run.bars) >= 2 and run.bars == sorted(run.bars), "the bar in the node moves"
    assert [title for title in run.titles if "%" in title and "XFuserKSamplerAdvanced" in title]
    assert len(run.of("b_preview_with_metadata")) >= 2 and run.pictures["XFuserKSamplerAdvanced"]
    see_image(user)
    user.view(0.75, (-1050, 60))
    user.look("image")
    user.view(0.9, (-560, 60))
    user.look("initializer")
    assert list(server.directory("output").glob("raylight/flux-dev*.png"))


def test_initializer_shows_choice(user: User) -> None:
    texts = user.page.evaluate(
        "window.app.graph.nodes.find((n) => n.type === 'RayInitializer').widgets.map((w) => String(w.value))"
    )
    assert any("ulysses" in text and "GPU and ulysses_degree chosen automatically" in text for text in texts)


def test_cancel_ends_run(user: User, server: ComfyServer) -> None:
    user.set_widgets(steps=2000, noise_seed=5)
    listen(user)
    user.click('[data-testid="queue-button"]')
    watch(user, PATIENCE, until=lambda run: len(run.of("progress")) > 2 or run.end is not None)
    user.look("before-cancel")
    user.click('[aria-label="Cancel current run"]')
    run = watch(user, PATIENCE)
    assert run.end["kind"] == "execution_interrupted", run.end
    assert run.of("progress")[-1]["value"] < 1900
    queue = server.queue()
    assert not queue.running and not queue.pending
    user.look("after-cancel")


def test_drag_drop_in_loader_into_stock_workflow(user: User, server: ComfyServer) -> None:
    stock = copy.deepcopy(workflow("flux-dev-dropin"))
    for node in stock["nodes"]:
        if node["type"] == "RayModelLoader":
            node.update(type="UNETLoader", inputs=[], title="Load Diffusion Model")
            node["outputs"][0]["name"] = "MODEL"
    user.load(stock, "stock")
    user.set_widgets(**RUN, seed=3)
    user.view(0.7, (-200, 220))
    user.look("stock")

    title = "window.app.graph.nodes.find((n) => n.type === 'UNETLoader').pos"
    user.click_at(user.on_canvas(f"[{title}[0] + 120, {title}[1] - 12]"))
    user.press("Delete", 46)
    user.page.wait_for("!window.app.graph.nodes.some((n) => n.type === 'UNETLoader')", timeout=PATIENCE)

    user.click('[aria-label="Node Library (n)"]')
    user.click(".side-bar-panel input")
    user.type("as MODEL (Ray)")
    entry = user.find(".side-bar-panel [role=treeitem]", "Load Diffusion Model as MODEL (Ray)")
    free = user.on_canvas("window.app.graph.nodes.find((n) => n.type === 'EmptySD3LatentImage').pos")
    user.drag(entry, (free[0], free[1] + 150))
    loader = "window.app.graph.nodes.find((n) => n.type === 'RayModelLoader')"
    user.page.wait_for(f"!!{loader}", timeout=PATIENCE)
    user.click('[aria-label="Node Library (n)"]')

    sampler = "window.app.graph.nodes.find((n) => n.type === 'KSampler')"
    user.page.wait_for(
        "![...document.querySelectorAll('.side-bar-panel input')].some((e) => e.getClientRects().length)",
        timeout=PATIENCE,
    )  # closed
    user.drag(user.on_canvas(f"[...{loader}.getOutputPos(0)]"), user.on_canvas(f"[...{sampler}.getInputPos(0)]"))
    user.page.wait_for(f"{sampler}.getInputNode(0) === {loader}", timeout=PATIENCE)
    user.set_widgets(unet_name="flux1-dev.safetensors")
    assert user.problems() == []

    listen(user)
    user.click('[data-testid="queue-button"]')
    run = watch(user, PATIENCE, look="dropin")
    assert run.end["kind"] == "execution_success", run.end
    assert run.of("b_preview_with_metadata") and "no Ray initializer: " in server.log.read_text("utf-8")
    see_image(user)
    assert list(server.directory("output").glob("raylight/flux-dropin*.png"))
    user.look("dropin-image")


def test_help_page_opens(user: User) -> None:
    user.load(workflow("flux-dev-usp"), "help")
    user.view(0.6, (-300, 400))
    user.page.evaluate("window.app.canvas.selectNode(window.app.graph.nodes.find((n) => n.type === 'RayInitializer'))")
    time.sleep(1.0)  # the buttons above a node appear after it is drawn
    user.click('[data-testid="info-button"]')
    user.look("help-button")
    user.find("h1", "Ray Initializer")
    user.find("h2", "How many, and how")
    user.look("help")
