"""The start of a session, or of Ray for a later one, in a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from . import placement
from .config import ServiceSpec, SessionConfig
from .diagnosis import Remedies
from .errors import RunCancelled
from .joining import check_cluster
from .ray_runtime import RUNTIME
from .session import Session
from .timeouts import BackgroundCall

logger = logging.getLogger(__name__)

# More than the sum of the limits of all that a start waits for.
_STEPS = 6
_END_S = 120.0
_LOOK_S = 1.0


class Start:
    """A session that starts in the background, when what was there before it has ended.

    `session` is set when it is ready, `error` when it has failed; then `kept` is the old session, if that goes on.
    """

    has_workers = True

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
        self.kept: Session | None = None
        self._service, self._remedies, self._on_failure = service, remedies, on_failure
        self._cancelled = threading.Event()
        self._progress = "Starting workers"
        self._call: BackgroundCall[None] = BackgroundCall(lambda: self._run(before, old))

    @property
    def left(self) -> Session | None:
        """The session that there is by it, or still is, if any."""
        return self.session or self.kept

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

        self._call.wait(_STEPS * self.config.start_timeout_s, "the start of the workers", poll)
        assert self.session is not None, "it has started"
        return self.session

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

    def _run(self, before: Start | None, old: Session | None) -> None:
        try:
            if before is not None:
                before.settle()
                if before.kept is not None and before.kept.can_take(self.config):
                    self.session = before.kept
                    return
                old = before.left or old
            if old is not None:
                self._end(old)
            if not RUNTIME.serves(self.config):  # also one that a start has left which failed or was cancelled
                RUNTIME.disconnect()
            self.session = self._open()
        except BaseException as error:
            self.error = error
            raise

    def _end(self, old: Session) -> None:
        """End the session until now. Raises ConnectionError: when the new one's cluster does not answer; then the old
        one goes on.
        """
        if old.alive:
            try:
                check_cluster(self.config)
            except ConnectionError:
                self.kept = old
                raise
            logger.info("the workers restart: their configuration has changed")
        old.close()

    def _open(self) -> Session | None:
        return Session(self.config, self._service, self._cancelled.is_set, self._remedies, self._note, self._on_failure)

    def _note(self, ready: int, of_all: int) -> None:
        self._progress = f"Starting workers: {ready} of {of_all} ready"


class RayStart(Start):
    """The start of Ray, and of the process that workers are forked from, for a session that is not wanted yet.

    It goes on, without a session, until it is cancelled, and looks after Ray, as a session would.
    """

    has_workers = False

    def _open(self) -> None:
        service = self._service
        RUNTIME.connect(
            self.config,
            placement.environment(self.config, service),
            self._cancelled.is_set,
            (service.forked_imports, service.tried_imports),
        )
        logger.info("Ray is ready to start workers")
        while not self._cancelled.wait(_LOOK_S):
            if lost := RUNTIME.lost():
                RUNTIME.abandon()  # or Ray would end this process
                logger.warning("Ray has ended, as its process %s has: it starts again with the workers", lost)
                return
