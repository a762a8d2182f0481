"""What ComfyUI tells the page about a run, and what the page makes of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from person import Person

_KINDS = ("progress", "b_preview_with_metadata", "executed", "execution_success", "execution_error",
          "execution_interrupted")
_START = """(() => {
  window.raylightSeen = [];
  if (window.raylightListens) return;
  window.raylightListens = true;
  for (const kind of KINDS)
    window.app.api.addEventListener(kind, (event) => window.raylightSeen.push({
      kind, node: event.detail?.node ?? event.detail?.nodeId ?? null, value: event.detail?.value ?? null,
      message: event.detail?.exception_message ?? null}));
})()"""
_END = ("execution_success", "execution_error", "execution_interrupted")
# The bar in a node, the tab's title, and the pictures that nodes show.
_SHOWN = """({
  title: document.title,
  bars: window.app.graph.nodes.filter((node) => node.progress).map((node) => node.progress),
  pictures: Object.fromEntries(window.app.graph.nodes.filter((node) => node.imgs?.length).map(
    (node) => [node.type, [node.imgs[0].src, node.imgs[0].naturalWidth]])),
  seen: window.raylightSeen,
})"""


@dataclass(frozen=True, slots=True)
class Run:
    """All that was seen: the messages, the different fills of progress bars, titles, and pictures by node."""

    messages: list[dict[str, Any]]
    bars: list[float]
    titles: list[str]
    pictures: dict[str, set[str]]

    @property
    def end(self) -> dict[str, Any] | None:
        return next((message for message in self.messages if message["kind"] in _END), None)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["kind"] == kind]


def listen(person: Person) -> None:
    """Forget what was seen, and watch from now on."""
    person.page.evaluate(_START.replace("KINDS", str(list(_KINDS))))


def watch(person: Person, timeout: float, until: Any = lambda run: run.end is not None, look: str | None = None) -> Run:
    """Look at the page again and again until `until` holds; `look` names a picture to keep of the first preview."""
    deadline = time.monotonic() + timeout
    run = Run([], [], [], {})
    while True:
        shown = person.page.evaluate(_SHOWN)
        run = Run(shown["seen"], _more(run.bars, shown["bars"]), _more(run.titles, [shown["title"]]), run.pictures)
        for node, (address, width) in shown["pictures"].items():
            if width:
                run.pictures.setdefault(node, set()).add(address)
        if look and run.pictures and run.bars:
            time.sleep(0.3)  # until it is drawn
            person.look(look)
            look = None
        if until(run):
            return run
        if time.monotonic() > deadline:
            raise TimeoutError(f"not seen after {timeout} s, but {run.messages[-5:]}, titles {run.titles[-3:]}")
        time.sleep(0.05)


def _more(known: list[Any], new: list[Any]) -> list[Any]:
    return known + [value for value in new if value not in known]
