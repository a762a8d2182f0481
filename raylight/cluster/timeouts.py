"""Calls into Ray that may block for good when it is broken, made in a thread that nobody has to wait for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from .errors import RunCancelled

T = TypeVar("T")
_POLL_S = 0.05


class BackgroundCall:
    """A call that is under way in a thread of its own, which dies with the process.

    With `stays` the thread does not end with the call, but when it is let go: Linux ends processes that have asked to
    go with their parent, as Ray's have, when the very thread ends that has started them.
    """

    def __init__(self, call: Callable[[], T], stays: bool = False) -> None:
        self._ended, self._may_go = threading.Event(), threading.Event()
        if not stays:
            self._may_go.set()
        self._result: T | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, args=(call,), daemon=True, name="raylight-ray-call").start()

    def release(self) -> None:
        """Let the thread end, now or with the call."""
        self._may_go.set()

    def wait(self, timeout_s: float, what: str, wants_cancel: Callable[[], bool] = lambda: False) -> T:
        """What the call returns. Raises what it raises; TimeoutError, naming `what`, when it takes longer than that;
        RunCancelled when it is cancelled. It then still goes on."""
        deadline = time.monotonic() + timeout_s
        while not self._ended.wait(_POLL_S):
            if wants_cancel():
                raise RunCancelled
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} has not ended within {timeout_s:g} s")
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self, call: Callable[[], T]) -> None:
        try:
            self._result = call()
        except BaseException as error:  # for whoever waits
            self._error = error
        finally:
            self._ended.set()
        self._may_go.wait()


def with_timeout(call: Callable[[], T], timeout_s: float, what: str) -> T:
    """What `call` returns, waited for at most `timeout_s`. Raises as `BackgroundCall.wait`."""
    return BackgroundCall(call).wait(timeout_s, what)
