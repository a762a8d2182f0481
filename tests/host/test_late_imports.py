"""Import statements that are carried out when what they name is first used."""

from __future__ import annotations

import builtins
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from raylight.host.late_imports import LateImports

FILES = {
    "a_host/__init__.py": "",
    "a_host/user.py": """
import a_library
import a_library.inner as inner
import a_host.models.big
from a_library import Thing, function, inner as same, size, table
from a_host.models.limits import LIMIT
from .models.small import Model
from a_host.eager.base import BASE

try:
    from no_such_library import nothing
except ImportError:
    nothing = None

class Child(Model):
    pass

def use(value: "Thing | None" = None):
    return isinstance(value, Thing), function(2), inner.VALUE, a_library.VALUE, a_library.inner.VALUE, same.VALUE
""",
    "a_host/models/big.py": "SIZE = 3",
    "a_host/models/small.py": "class Model:\n    layers = 5",
    "a_host/models/unnamed.py": "SIZE = 8",
    "a_host/models/limits.py": "LIMIT = 2",
    "a_host/eager/base.py": "BASE = 'a constant'",
    "a_library/__init__.py": """
VALUE, size, table = 1, 4, {"a": 1}
class Thing: pass
def function(count): return count * 10
""",
    "a_library/inner.py": "VALUE = 7",
    "a_stranger.py": "import a_library",
}


@pytest.fixture
def late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LateImports]:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    late = LateImports(
        ("a_host",), ("a_library", "no_such_library"), ("a_host.models", "a_host.eager"), ("a_host.eager",)
    )
    monkeypatch.setattr(builtins, "__import__", late.instead_of(builtins.__import__))
    yield late
    for name in [one for one in sys.modules if one.partition(".")[0] in ("a_host", "a_library", "a_stranger")]:
        del sys.modules[name]


def user() -> ModuleType:
    return importlib.import_module("a_host.user")


def test_nothing_is_imported_before_it_is_used(late: LateImports) -> None:
    found = user()
    assert "a_library" not in sys.modules and "a_host.models.big" not in sys.modules
    assert "a_host.models.small" in sys.modules, "a base class is used at once"
    assert ("a_library", "Thing") in late.made and ("a_host.models.small", "Model") in late.made
    assert found.BASE == "a constant" and found.nothing is None


def test_what_is_used_is_what_was_asked_for(late: LateImports) -> None:
    found = user()
    assert found.use() == (False, 20, 7, 1, 7, 7)
    library = sys.modules["a_library"]
    assert found.Thing is library.Thing and found.function is library.function, "names are replaced when they are used"
    assert found.use(library.Thing())[0]
    assert found.a_host.models.big.SIZE == 3 and "a_host.models.big" in sys.modules
    assert found.Child.__mro__[1] is sys.modules["a_host.models.small"].Model


def test_a_name_can_be_anything_that_a_class_can(late: LateImports) -> None:
    found = user()
    thing, union = found.Thing, found.Thing | None
    assert isinstance(thing(), sys.modules["a_library"].Thing)
    assert union == sys.modules["a_library"].Thing | None
    assert thing.__name__ == "Thing" and issubclass(sys.modules["a_library"].Thing, thing)
    late_model = found.a_host.models
    assert late_model.small.Model.layers == 5


def test_values_are_compared_and_computed_with(late: LateImports) -> None:
    found = user()
    assert "a_library" not in sys.modules
    size, table = found.size, found.table
    assert size == 4 and size > 3 and 5 > size and size + 1 == 5 and 9 - size == 5 and size != 5 and -size == -4
    assert "a" in table and table["a"] == 1 and list(table) == ["a"] and len(table) == 1 and bool(table)
    assert (
        str(size) == repr(size) == "4"
        and 8 * size == 32
        and "abcdefg"[size] == "e"
        and {4: 1}[size] == 1
        and float(size) == 4.0
    )
    assert type(found.LIMIT) is int, "it is not late"


def test_what_is_set_on_a_module_is_set_on_the_module_itself(late: LateImports) -> None:
    found = user()
    found.a_library.VALUE = 11
    assert sys.modules["a_library"].VALUE == 11 and found.use()[3] == 11


def test_a_package_imports_the_modules_that_it_is_asked_for(late: LateImports) -> None:
    """Node packs may rely on what ComfyUI's own modules would have imported."""
    models = user().a_host.models
    assert "a_host.models.unnamed" not in sys.modules and models.unnamed.SIZE == 8
    assert not hasattr(models, "no_such_module") and not hasattr(models, "__all__")


def test_others_import_at_once_and_what_is_there_is_not_late(late: LateImports) -> None:
    importlib.import_module("a_stranger")
    library = sys.modules["a_library"]
    assert user().a_library is library and ("a_library", "Thing") not in late.made


def test_a_name_that_is_not_there_is_an_error_when_it_is_used(
    late: LateImports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_host" / "wrong.py").write_text("from a_library import missing")
    wrong = importlib.import_module("a_host.wrong")
    with pytest.raises(ModuleNotFoundError, match="missing"):
        wrong.missing()
