"""A drafted plan as data for JSON, and as the Python text of `raylight/plans`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from raylight.parallel import plan as rules
from raylight.parallel.plan import SequencePlan

_RULES = {
    rule.__name__: rule
    for rule in (
        rules.Stream,
        rules.Aligned,
        rules.TokenIndex,
        rules.TokenRanges,
        rules.Gathered,
        rules.GatherAround,
        rules.Gather,
        rules.Dropped,
        rules.SelfAttention,
        rules.CrossAttention,
        rules.FullAttention,
    )
}
_PARTS = ("inputs", "attention", "outputs")


def to_data(plan: SequencePlan) -> dict[str, Any]:
    """Return a drafted plan as dicts, lists, strings and numbers."""
    return {"model": plan.model, "heads": plan.heads} | {name: _data(getattr(plan, name)) for name in _PARTS}


def from_data(data: Mapping[str, Any]) -> SequencePlan:
    """Return the plan of `to_data`.

    Raises ValueError, KeyError or TypeError: for what is no such data.
    """
    return SequencePlan(data["model"], *(_rules(data[name]) for name in _PARTS), heads=data["heads"])


def _data(value: Any) -> Any:
    if type(value).__name__ in _RULES:
        return {"rule": type(value).__name__} | {name: _data(item) for name, item in _given(value).items()}
    if isinstance(value, Mapping):
        return [[_data(name), _data(item)] for name, item in value.items()]
    return [_data(item) for item in value] if isinstance(value, tuple) else value


def _rules(pairs: Any) -> dict[Any, Any]:
    return {name: _rules(value) if _is_pairs(value) else _rule(value) for name, value in pairs}


def _is_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, list) for one in value)


def _rule(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_rule(one) for one in value)
    if not isinstance(value, Mapping):
        return value
    given = {name: _rule(item) for name, item in value.items() if name != "rule"}
    return _RULES[value["rule"]](**given)


def _given(rule: Any) -> dict[str, Any]:
    """Return the fields of a rule that differ from their defaults."""
    # For a field that has none, `default` is a mark that no value is equal to.
    return {field.name: value for field in fields(rule) if (value := getattr(rule, field.name)) != field.default}


def to_python(plan: SequencePlan) -> str:
    """Return the text of a drafted plan for a file in `raylight/plans`."""
    lines = ["SequencePlan(", f"    model={_text(plan.model)},"]
    for name in _PARTS:
        lines.append(f"    {name}={{")
        for path, value in getattr(plan, name).items():
            lines.append(f"        {_text(path)}: {_text(value)},")
        lines.append("    },")
    return "\n".join([*lines, f"    heads={_text(plan.heads)},", ")"])


def _text(value: Any) -> str:
    if type(value).__name__ in _RULES:
        return f"{type(value).__name__}({', '.join(f'{name}={_text(item)}' for name, item in _given(value).items())})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_text(name)}: {_text(item)}" for name, item in value.items()) + "}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))}{',' if len(value) == 1 else ''})"
    return f'"{value}"' if isinstance(value, str) else repr(value)
