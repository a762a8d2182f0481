"""Time limits for calls into Ray that may block forever when Ray is broken."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from .errors import RunCancelled

T = TypeVar("T")
_POLL_S = 0.05


class BackgroundCall(Generic[T]):
    """A call in a daemon thread, which dies with the process.

    `stays`: keep the thread alive until `release()`. Ray's children set a parent-death signal, and Linux sends it when
    the *thread* that started them exits.
    """

    def __init__(self, call: Callable[[], T], stays: bool = False) -> None:
        self._ended, self._released = threading.Event(), threading.Event()
        if not stays:
            self._released.set()
        self._result: Any = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, args=(call,), daemon=True, name="raylight-ray-call").start()

    def release(self) -> None:
        """Let the thread end, now or when the call does."""
        self._released.set()

    def wait(self, timeout_s: float, what: str, wants_cancel: Callable[[], bool] = lambda: False) -> T:
        """Return the call's result. The call goes on after a timeout or cancel.

        Raises what the call raises. Raises TimeoutError, naming `what`: after `timeout_s`. Raises RunCancelled: when
        cancelled.
        """
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
        except BaseException as error:  # raised again in `wait`
            self._error = error
        finally:
            self._ended.set()
        self._released.wait()


def with_timeout(call: Callable[[], T], timeout_s: float, what: str) -> T:
    """Return the result of `call`. Raises as `BackgroundCall.wait`."""
    return BackgroundCall(call).wait(timeout_s, what)
