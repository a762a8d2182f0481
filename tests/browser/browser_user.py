"""A user's actions in ComfyUI's frontend: look, click, drag, type."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from chromium import BrowserError, Page

Point = tuple[float, float]
_READY = (
    "window.app?.extensionManager && window.app?.graph && "
    "Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 100"
)
_FIND = """(async () => {
  const [selector, text] = %s;
  const found = [...document.querySelectorAll(selector)].find(
    (e) => (text === null || e.innerText.trim() === text) && e.getClientRects().length);
  if (!found) return null;
  found.scrollIntoView({block: "center"});
  const place = () => {
    const box = found.getBoundingClientRect();
    return [box.x + box.width / 2, box.y + box.height / 2];
  };
  const before = place();
  await new Promise((done) => setTimeout(done, 150));
  return String(place()) === String(before) ? before : null;
})()"""
# Red: nodes, link slots, widgets with an invalid value, and the frontend's own messages.
_PROBLEMS = """(() => {
  const found = [...document.querySelectorAll('[data-testid="error-overlay"], .p-toast-message-error')].map(
    (e) => e.innerText);
  for (const node of window.app.graph.nodes) {
    if (!(node.type in window.LiteGraph.registered_node_types)) found.push(`no node ${node.type}`);
    if (node.mode === 4) continue;  // off, until the user has chosen a file
    if (node.has_errors) found.push(`red: ${node.type}`);
    for (const slot of node.inputs ?? []) if (slot.hasErrors) found.push(`red: ${node.type}.${slot.name}`);
    for (const widget of node.widgets ?? []) {
      const values = widget.options?.values;
      const choices = typeof values === "function" ? values() : values;
      if (widget.type === "combo" && Array.isArray(choices) && !choices.includes(widget.value))
        found.push(`${node.type}.${widget.name} = ${widget.value}`);
    }
  }
  return found;
})()"""


class User:
    """A user of one page. With a folder, `look` keeps screenshots there."""

    def __init__(self, page: Page, screenshots: Path | None) -> None:
        self.page = page
        self._screenshots = screenshots
        if screenshots is not None:
            screenshots.mkdir(parents=True, exist_ok=True)

    def open(self, address: str) -> None:
        """Open ComfyUI for the first time; it greets a new user with the menu of templates."""
        self.page.open(address)
        self.page.wait_for(_READY)
        self.click('[aria-label="Close dialog"]')
        # The canvas is drawn by the CPU, which the workers need.
        self.page.evaluate("window.app.extensionManager.setting.set('LiteGraph.Canvas.MaximumFps', 8)")

    def look(self, name: str) -> None:
        if self._screenshots is not None:
            (self._screenshots / f"{name}.png").write_bytes(self.page.screenshot())

    def find(self, selector: str, text: str | None = None, timeout: float = 300.0) -> Point:
        """Return the middle of the first visible element, once there is one and it no longer moves."""
        deadline = time.monotonic() + timeout
        while True:
            place = self.page.evaluate(_FIND % json.dumps([selector, text]))
            if place is not None:
                return tuple(place)
            if time.monotonic() > deadline:
                raise BrowserError(f"there is no {selector} {text or ''} after {timeout} s")
            time.sleep(0.1)

    def click(self, selector: str, text: str | None = None) -> None:
        self.click_at(self.find(selector, text))

    def click_at(self, place: Point) -> None:
        self._mouse("mouseMoved", place)
        self._mouse("mousePressed", place)
        self._mouse("mouseReleased", place)

    def drag(self, start: Point, end: Point, steps: int = 8) -> None:
        self._mouse("mouseMoved", start)
        self._mouse("mousePressed", start)
        for step in range(1, steps + 1):
            self._mouse(
                "mouseMoved", tuple(a + (b - a) * step / steps for a, b in zip(start, end, strict=True)), held=True
            )
            time.sleep(0.05)
        self._mouse("mouseReleased", end)

    def type(self, text: str) -> None:
        self.page.call("Input.insertText", {"text": text})

    def press(self, key: str, code: int) -> None:
        """Press a key; `code` is its Windows virtual-key code, which browsers use."""
        for kind in ("rawKeyDown", "keyUp"):
            self.page.call(
                "Input.dispatchKeyEvent", {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code}
            )

    # -- the graph ----------------------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        return self.page.evaluate(_PROBLEMS)

    def load(self, workflow: dict[str, Any], name: str) -> None:
        """Open a workflow, as if its file were dropped on the page."""
        self.page.evaluate(f"window.app.loadGraphData({json.dumps(workflow)}, true, true, {json.dumps(name)})")

    def set_widgets(self, **values: Any) -> None:
        """Set all widgets of these names to these values."""
        self.page.evaluate(f"""(() => {{
          const values = {json.dumps(values)};
          for (const node of window.app.graph.nodes)
            for (const widget of node.widgets ?? [])
              if (widget.name in values) widget.value = values[widget.name];
        }})()""")

    def view(self, scale: float, offset: Point) -> None:
        """Zoom and move the canvas."""
        self.page.evaluate(f"""(() => {{
          const view = window.app.canvas.ds;
          view.scale = {scale}; view.offset = {list(offset)};
          window.app.canvas.setDirty(true, true);
        }})()""")
        time.sleep(0.5)

    def on_canvas(self, expression: str) -> Point:
        """Return where a point of the graph, as a JavaScript expression of x and y, is on the screen."""
        x, y = self.page.evaluate(f"""(() => {{
          const [x, y] = {expression}, view = window.app.canvas.ds;
          const box = window.app.canvas.canvas.getBoundingClientRect();
          return [box.x + (x + view.offset[0]) * view.scale, box.y + (y + view.offset[1]) * view.scale];
        }})()""")
        return x, y

    def _mouse(self, kind: str, place: Point, *, held: bool = False) -> None:
        pressed = held or kind != "mouseMoved"
        self.page.call(
            "Input.dispatchMouseEvent",
            {
                "type": kind,
                "x": place[0],
                "y": place[1],
                "button": "left" if pressed else "none",
                "buttons": int(held or kind == "mousePressed"),
                "clickCount": int(kind != "mouseMoved"),
            },
        )
