"""The start of a session, in a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from .config import ServiceSpec, SessionConfig
from .diagnosis import Remedies
from .errors import RunCancelled
from .ray_runtime import RUNTIME
from .session import Session
from .timeouts import BackgroundCall

logger = logging.getLogger(__name__)

# More than the sum of the limits of all that a start waits for.
_STEPS = 6
_END_S = 120.0


class Start:
    """A session that starts in the background, when what was there before it has ended.

    `session` is set when it is ready, `error` when it has failed.
    """

    def __init__(
        self,
        config: SessionConfig,
        service: ServiceSpec,
        remedies: Remedies,
        before: Start | None,
        old: Session | None,
        on_failure: Callable[[Session], None],
    ) -> None:
        """`before` is a start that was cancelled, and `old` the session until now."""
        self.config = config
        self.session: Session | None = None
        self.error: BaseException | None = None
        self._service, self._remedies, self._on_failure = service, remedies, on_failure
        self._cancelled = threading.Event()
        self._progress = "Starting workers"
        self._call: BackgroundCall[Session] = BackgroundCall(lambda: self._run(before, old))

    @property
    def ended(self) -> bool:
        """Whether there is a session or an error."""
        return self.session is not None or self.error is not None

    def wait(self, wants_cancel: Callable[[], bool], on_progress: Callable[[str], None]) -> Session:
        """Return the session. Raises as `Session`; RunCancelled when cancelled, while the start goes on."""
        shown = ""

        def poll() -> bool:
            nonlocal shown
            if shown != self._progress:
                shown = self._progress
                on_progress(shown)
            return wants_cancel()

        return self._call.wait(_STEPS * self.config.start_timeout_s, "the start of the workers", poll)

    def cancel(self) -> None:
        """Have the start end without a session, if it can still be stopped. Does not wait."""
        self._cancelled.set()

    def settle(self, timeout_s: float = _END_S) -> None:
        """Wait until the start has ended, whatever its result. Gives up, with a warning, after `timeout_s`."""
        try:
            self._call.wait(timeout_s, "the start of the workers")
        except TimeoutError as error:
            logger.warning("%s", error)
        except (Exception, RunCancelled) as error:
            logger.debug("the start of workers that are not wanted any more has ended: %s", error)

    def _run(self, before: Start | None, old: Session | None) -> Session:
        try:
            if before is not None:
                before.settle()
                old = before.session or old
            if old is not None:
                old.close()
            if not RUNTIME.serves(self.config):  # also one that a start has left which failed or was cancelled
                RUNTIME.disconnect()
            self.session = Session(
                self.config, self._service, self._cancelled.is_set, self._remedies, self._note, self._on_failure
            )
        except BaseException as error:
            self.error = error
            raise
        return self.session

    def _note(self, ready: int) -> None:
        self._progress = f"Starting workers: {ready} of {self.config.world_size} ready"
