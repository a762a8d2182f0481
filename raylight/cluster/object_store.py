"""Objects in Ray's object store, which workers fetch when they need them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from .diagnosis import is_store_full, store_full
from .serialization import SerializedObject
from .timeouts import with_timeout

_PUT_S = _GET_S = 120.0


def put(value: Any) -> ray.ObjectRef:
    """Put an object into the store. Raises StoreFull."""
    try:
        return with_timeout(lambda: ray.put(value), _PUT_S, "sending to the workers")
    except Exception as error:
        if not isinstance(error, TimeoutError) and not is_store_full(error):
            raise
        raise store_full("what is sent to the workers", error) from error


@dataclass(frozen=True, slots=True)
class ObjectHandle:
    """A reference to an object in Ray's object store. `key` is the same for the same content."""

    key: str
    _reference: ray.ObjectRef

    def get(self) -> Any:
        """Return the object. Its arrays are in shared, read-only memory. Raises ray's GetTimeoutError: after 120 s."""
        return ray.get(self._reference, timeout=_GET_S)


class ObjectCache:
    """Objects of one session, each put into the store once. At most `limit` of them stay, and no more than one if they
    take over `limit_bytes`: the least recently used are released.
    """

    def __init__(self, limit: int, limit_bytes: int) -> None:
        self._limit, self._limit_bytes = limit, limit_bytes
        self._objects: dict[str, tuple[ObjectHandle, int]] = {}

    def of(self, key: str, make: Callable[[], SerializedObject]) -> ObjectHandle:
        """Return the handle of a key's object. Call `make` only if the object is not there. Raises StoreFull."""
        found = self._objects.pop(key, None)
        if found is None:
            made = make()
            self._make_room(made.nbytes)
            found = ObjectHandle(key, put(made)), made.nbytes
        self._objects[key] = found
        return found[0]

    def clear(self) -> None:
        """Release all objects."""
        self._objects.clear()

    def _make_room(self, size: int) -> None:
        held = sum(one for _, one in self._objects.values())
        while self._objects and (len(self._objects) >= self._limit or held + size > self._limit_bytes):
            held -= self._objects.pop(next(iter(self._objects)))[1]
