"""Import statements that are carried out when what they name is first used, as PEP 810 proposes for Python.

ComfyUI's modules import all models, text encoders and libraries at once. A worker uses few of them, or none.

A statement `import a.b` gives a stand-in for the module, `from a import b` one for the name. Each imports the module as
soon as anything is asked of it: an attribute, a call, a base class, an `isinstance`, an operator. So a stand-in behaves
as what it stands for; a name is replaced by it in the module that had imported it, too. Only `is` tells them apart, so
names in capitals, which may be any value, are not late. The packages that late modules lie in import other modules when
they are asked for.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

_Import = Callable[..., Any]


class LateImports:
    """Which import statements are late. `made` are the stand-ins for names, as (module, name)."""

    def __init__(self, importers: Sequence[str], libraries: Sequence[str], own: Sequence[str], now: Sequence[str] = ()):
        """Those in the packages `importers`, of `libraries` and of the modules `own`, with all that is within; but none
        of the modules `now`. The packages that `own` lie in have to be cheap to import.
        """
        self._importers, self._libraries, self._own, self._now = importers, libraries, own, now
        self._modules: dict[str, _LateModule] = {}
        self.made: list[tuple[str, str]] = []

    def instead_of(self, original: _Import) -> _Import:
        """Return what can take the place of `builtins.__import__`."""

        def load(
            name: str,
            globals: Mapping[str, Any] | None = None,
            locals: Mapping[str, Any] | None = None,
            fromlist: Sequence[str] | None = (),
            level: int = 0,
        ) -> Any:
            if globals is not None and _is_in(globals.get("__name__") or "", self._importers):
                full = importlib.util.resolve_name("." * level + name, globals["__package__"]) if level else name
                if not any(one == "*" or one.isupper() for one in fromlist or ()) and self._is_late(full):
                    if fromlist:
                        return _Names(full, globals, self.made)
                    return self._module(full)
            return original(name, globals, locals, fromlist, level)

        return load

    def _is_late(self, module: str) -> bool:
        """Return whether an import of a module is to be late, which it is not if it is there, or is not to be found."""
        if module in sys.modules:
            return False
        library = module.partition(".")[0]
        if _is_in(module, self._libraries):
            return library not in sys.modules and importlib.util.find_spec(library) is not None
        if not _is_in(module, self._own) or _is_in(module, self._now) or not _can_be_found(module):
            return False
        if package := module.rpartition(".")[0]:
            _let_import_what_is_asked_for(sys.modules[package])
        return True

    def _module(self, name: str) -> Any:
        """Return what the statement `import a.b.c` gives, which is `a`."""
        if not _is_in(name, self._libraries):
            parent, _, child = name.rpartition(".")
            if not parent:
                return self._stand_in(name)
            setattr(sys.modules[parent], child, self._stand_in(name))  # replaced by its import
            return sys.modules[name.partition(".")[0]]
        while "." in name:
            parent, _, child = name.rpartition(".")
            self._stand_in(parent).late_children[child] = self._stand_in(name)
            name = parent
        return self._stand_in(name)

    def _stand_in(self, name: str) -> _LateModule:
        if name not in self._modules:
            self._modules[name] = _LateModule(name)
        return self._modules[name]


class _LateModule(ModuleType):
    """Stands in for a module. `late_children` are stand-ins for modules in it, which were imported by name."""

    late_children: dict[str, _LateModule]

    def __init__(self, name: str) -> None:
        super().__init__(name)
        vars(self)["late_children"] = {}

    def __getattr__(self, name: str) -> Any:
        if name in self.late_children:
            return self.late_children[name]
        return getattr(importlib.import_module(self.__name__), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(importlib.import_module(self.__name__), name, value)

    def __dir__(self) -> list[str]:
        return dir(importlib.import_module(self.__name__))


class _Names:
    """Stands in for a module while a statement `from module import ...` takes names from it."""

    def __init__(self, module: str, importer: Mapping[str, Any], made: list[tuple[str, str]]) -> None:
        self._late = module, importer, made

    def __getattr__(self, name: str) -> Any:
        module, importer, made = self._late
        made.append((module, name))
        return _LateName(module, name, importer)


class _LateName:
    """Stands in for a class, function or module that a module imports from another, `module`."""

    def __init__(self, module: str, name: str, importer: Mapping[str, Any]) -> None:
        vars(self)["_late"] = module, name, importer

    def _found(self) -> Any:
        module, name, importer = vars(self)["_late"]
        try:
            found = getattr(importlib.import_module(module), name)
        except AttributeError:
            found = importlib.import_module(f"{module}.{name}")
        for alias, value in list(importer.items()):
            if value is self:
                importer[alias] = found  # pyright: ignore[reportIndexIssue]
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._found(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._found(), name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._found()(*args, **kwargs)

    def __mro_entries__(self, _: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._found(),)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, self._found())

    def __subclasscheck__(self, subclass: type) -> bool:
        return issubclass(subclass, self._found())

    def __dir__(self) -> list[str]:
        return dir(self._found())


# Should a value have another name than one in capitals, operators give what they give for the value.
_REFLECTED = "add sub mul truediv floordiv mod pow and or xor".split()
_OPERATORS = [*_REFLECTED, *"lt le gt ge eq ne contains getitem neg pos abs invert index".split()]
_FUNCTIONS = "hash bool len iter str repr int float".split()


def _delegate(name: str, function: Callable[..., Any], reflected: bool = False) -> None:
    """Let stand-ins for names carry out `function` on what they stand for."""

    def operate(self: _LateName, *args: Any) -> Any:
        return function(*args, self._found()) if reflected else function(self._found(), *args)

    setattr(_LateName, f"__{name}__", operate)


for _name in _OPERATORS:
    _delegate(_name, getattr(operator, f"__{_name}__"))
for _name in _REFLECTED:
    _delegate(f"r{_name}", getattr(operator, f"__{_name}__"), reflected=True)
for _name in _FUNCTIONS:
    _delegate(_name, getattr(builtins, _name))


def _let_import_what_is_asked_for(package: ModuleType) -> None:
    """Have a package import its modules when they are asked for: others would have, without late imports."""

    def find(name: str) -> ModuleType:
        module = f"{package.__name__}.{name}"
        if name.startswith("__") or not _can_be_found(module):
            raise AttributeError(f"module {package.__name__!r} has no attribute {name!r}")
        return importlib.import_module(module)

    vars(package).setdefault("__getattr__", find)


def _is_in(module: str, packages: Sequence[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _can_be_found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None  # imports the packages that it is in
    except ModuleNotFoundError:
        return False
