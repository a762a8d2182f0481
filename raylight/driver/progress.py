"""What the executing node shows while its workers start, read a model, and choose degrees for a run."""

from __future__ import annotations

import logging
import time

import comfy.utils
from comfy_execution.utils import get_executing_context

from raylight.host.jobs import DegreesChosen, ExchangeTold, LoadProgress
from raylight.host.prompt_server import prompt_server

logger = logging.getLogger(__name__)


def show_text(text: str) -> None:
    """Write `text` on the node that ComfyUI executes in this thread, if it executes one and has a server."""
    server = prompt_server()
    context = get_executing_context()
    if server is not None and context is not None:
        server.send_progress_text(text, context.node_id)


class Loading:
    """Shows on the executing node how much of a model was read, in words and on its bar, with which degrees it runs,
    and what is told of its exchanges.
    """

    def __init__(self) -> None:
        self._told: dict[str, str] = {}  # of the run, in order
        self._last: LoadProgress | None = None
        self._bar: comfy.utils.ProgressBar | None = None
        self._began = self._shown_at = time.monotonic()

    def show(self, progress: LoadProgress) -> None:
        """Show how far the reading is."""
        if self._last is None or self._bar is None or self._last.name != progress.name:
            self._began = time.monotonic()
            self._bar = comfy.utils.ProgressBar(progress.total_bytes)
        self._last, self._shown_at = progress, time.monotonic()
        show_text(text_of(progress))
        if progress.done_bytes < progress.total_bytes:  # a full bar would be that of the node
            self._bar.update_absolute(progress.done_bytes)

    def show_degrees(self, chosen: DegreesChosen) -> None:
        """Show the degrees of the run, and log them."""
        self._tell("degrees", chosen.text)

    def show_exchange(self, told: ExchangeTold) -> None:
        """Show how tokens are exchanged, and log it."""
        self._tell("exchange", told.text)

    def _tell(self, what: str, text: str) -> None:
        self._told[what] = f"{what}: {text}"
        logger.info("%s", self._told[what])
        show_text("; ".join(self._told.values()))

    def end(self) -> None:
        """Say that the model is there, if any progress was shown."""
        if self._last is not None:
            # Not until now: the job may have sampled since.
            size, seconds = self._last.total_bytes / 1e9, self._shown_at - self._began
            loaded = f"{self._last.name} is loaded: {size:.1f} GB in {seconds:.1f} s"
            show_text("; ".join((loaded, *self._told.values())))


def text_of(progress: LoadProgress) -> str:
    """Return the words for a progress."""
    done, total = progress.done_bytes, progress.total_bytes
    return f"Loading {progress.name}: {100 * done // max(1, total)} % ({done / 1e9:.1f} of {total / 1e9:.1f} GB)"
