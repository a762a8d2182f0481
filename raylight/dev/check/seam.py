"""One thing of ComfyUI that Raylight stands on, and the sentence that tells that it is gone."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Seam:
    """`what` names the thing as ComfyUI does, `where` the file of Raylight that uses it, and `stops` is a clause that
    says what does not work without it. `look` returns None if the thing is there, else the rest of a sentence that
    begins with `what`, such as "is gone"; what it raises counts as "fails".
    """

    what: str
    where: str
    stops: str
    look: Callable[[], str | None]

    def missing(self) -> str | None:
        """Return a sentence on what is gone, where it is used and what stops working, or None if it is there."""
        try:
            wrong = self.look()
        except Exception as error:
            wrong = f"fails ({type(error).__name__}: {error})"
        return None if wrong is None else f"{self.what} {wrong}. It is used in {self.where}: without it, {self.stops}."


GONE = "is gone"


def find(path: str) -> Any:
    """Return the object of a dotted path such as `comfy.sd.VAE.decode`, importing what has to be imported.

    Raises LookupError: there is none.
    """
    names = path.split(".")
    for length in range(len(names), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(names[:length]))
        except ModuleNotFoundError:
            continue
        try:
            for name in names[length:]:
                found = getattr(found, name)
        except AttributeError:
            break
        return found
    raise LookupError(path)


def exists(path: str) -> str | None:
    """Return None if there is an object of this dotted path, else GONE."""
    try:
        find(path)
    except LookupError:
        return GONE
    return None
