"""Attention overrides of packs that are kernels, and so do with each head and each query what they do with any."""

from __future__ import annotations

import re
from types import CodeType, FunctionType, MethodType
from typing import Any

from .foreign_code import is_foreign

_LIBRARIES = re.compile(r"sage_?att|flash_?att|xformers|memory_efficient_attention|sparge_?att", re.IGNORECASE)


def is_kernel(override: Any) -> bool:
    """Whether an override may be given some of the heads, and in cross attention some of the queries.

    ComfyUI's own are. Of a pack's it is where it calls a library of attention kernels, which packs put in by an
    override for speed; any other may look at heads and tokens by their number.
    """
    return not is_foreign(override) or any(_LIBRARIES.search(name) for name in _names(override))


def _names(function: Any) -> set[str]:
    """The names that a function uses, and those that functions of packs use that it calls."""
    names: set[str] = set()
    seen: set[int] = set()
    functions = [function]
    while functions:
        one = functions.pop()
        for name in ("func", "_torchdynamo_orig_callable", "__wrapped__"):
            if hasattr(one, name):
                functions.append(getattr(one, name))
        if isinstance(one, MethodType):
            one = one.__func__
        if not isinstance(one, FunctionType):
            one = vars(type(one)).get("__call__")
        if not isinstance(one, FunctionType) or id(one) in seen:
            continue
        seen.add(id(one))
        used = _used(one.__code__)
        names |= used
        values = [one.__globals__.get(name) for name in used]
        for cell in one.__closure__ or ():
            try:
                values.append(cell.cell_contents)
            except ValueError:  # not set yet
                continue
        functions += [value for value in values if isinstance(value, (FunctionType, MethodType))
                      and (is_foreign(value) or _LIBRARIES.search(value.__name__))]
        names |= {value.__name__ for value in values if isinstance(value, (FunctionType, MethodType))}
    return names


def _used(code: CodeType) -> set[str]:
    names = {*code.co_names, *code.co_freevars}
    for const in code.co_consts:
        if isinstance(const, CodeType):
            names |= _used(const)
    return names
