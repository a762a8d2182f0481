"""Objects in Ray's object store that workers fetch when they need them. Each is put there once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

_GET_S = 120.0


@dataclass(frozen=True, slots=True)
class ObjectHandle:
    """A reference to an object in Ray's object store. `key` is the same for the same content."""

    key: str
    _reference: ray.ObjectRef

    def get(self) -> Any:
        """Return the object. Its arrays are in shared, read-only memory. Raises ray's GetTimeoutError: after 120 s."""
        return ray.get(self._reference, timeout=_GET_S)


class ObjectCache:
    """Objects of one session in the store, at most `limit`. The least recently used are released."""

    def __init__(self, limit: int, put: Callable[[Any], ray.ObjectRef]) -> None:
        self._limit = limit
        self._put = put
        self._objects: dict[str, ObjectHandle] = {}

    def of(self, key: str, make: Callable[[], Any]) -> ObjectHandle:
        """Return the handle of a key's object. Call `make` only if the object is not there."""
        found = self._objects.pop(key, None)
        if found is None:
            found = ObjectHandle(key, self._put(make()))
            while len(self._objects) >= self._limit:
                del self._objects[next(iter(self._objects))]
        self._objects[key] = found
        return found
