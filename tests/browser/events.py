"""ComfyUI's messages to the page about a run, and what the page shows."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from browser_user import User

_KINDS = (
    "progress",
    "b_preview_with_metadata",
    "executed",
    "execution_success",
    "execution_error",
    "execution_interrupted",
)
# The page itself records what it shows, ten times a second and after each message: polling from outside
# misses much of it on a busy machine.
_START = """(() => {
  window.raylightSeen = {messages: [], bars: [], titles: [], pictures: {}};
  if (window.raylightListens) return;
  window.raylightListens = true;
  const keep = (list, value) => { if (!list.includes(value)) list.push(value); };
  const look = () => {
    const seen = window.raylightSeen;
    keep(seen.titles, document.title);
    for (const node of window.app.graph.nodes) {
      if (node.progress) keep(seen.bars, node.progress);
      for (const picture of node.imgs ?? [])
        if (picture.naturalWidth) keep(seen.pictures[node.type] ??= [], picture.src);
    }
  };
  setInterval(look, 100);
  for (const kind of KINDS)
    window.app.api.addEventListener(kind, (event) => {
      window.raylightSeen.messages.push({
        kind, node: event.detail?.node ?? event.detail?.nodeId ?? null, value: event.detail?.value ?? null,
        message: event.detail?.exception_message ?? null});
      setTimeout(look);
    });
})()"""
_END = ("execution_success", "execution_error", "execution_interrupted")


@dataclass(frozen=True, slots=True)
class Run:
    """Everything seen: messages, different fills of progress bars, titles, and pictures by node type."""

    messages: list[dict[str, Any]]
    bars: list[float]
    titles: list[str]
    pictures: dict[str, list[str]]

    @property
    def end(self) -> dict[str, Any] | None:
        return next((message for message in self.messages if message["kind"] in _END), None)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["kind"] == kind]


def listen(user: User) -> None:
    """Forget what was seen, and record from now on."""
    user.page.evaluate(_START.replace("KINDS", str(list(_KINDS))))


def watch(user: User, timeout: float, until: Any = lambda run: run.end is not None, look: str | None = None) -> Run:
    """Check the page repeatedly until `until` holds; `look` names a screenshot to keep of the first preview."""
    deadline = time.monotonic() + timeout
    while True:
        run = Run(**user.page.evaluate("window.raylightSeen"))
        if look and run.pictures and run.bars:
            time.sleep(0.3)  # until it is drawn
            user.look(look)
            look = None
        if until(run):
            return run
        if time.monotonic() > deadline:
            raise TimeoutError(f"not seen after {timeout} s, but {run.messages[-5:]}, titles {run.titles[-3:]}")
        time.sleep(0.05)
