"""Objects that workers fetch when they want them, and that are put where they can only once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

_GET_S = 120.0


@dataclass(frozen=True, slots=True)
class ObjectHandle:
    """An object in Ray's store. `key` is the same for the same content."""

    key: str
    _reference: ray.ObjectRef

    def get(self) -> Any:
        """The object; arrays in it lie in memory that is shared and read only. Raises ray's GetTimeoutError."""
        return ray.get(self._reference, timeout=_GET_S)


class ObjectCache:
    """The objects that this process has put, by `put`, for one session, the least recently used first."""

    def __init__(self, limit: int, put: Callable[[Any], ray.ObjectRef]) -> None:
        self._limit = limit
        self._put = put
        self._held: dict[str, ObjectHandle] = {}

    def of(self, key: str, make: Callable[[], Any]) -> ObjectHandle:
        """The object of a key, made only when it is not there."""
        found = self._held.pop(key, None)
        if found is None:
            found = ObjectHandle(key, self._put(make()))
            while len(self._held) >= self._limit:
                del self._held[next(iter(self._held))]
        self._held[key] = found
        return found
