"""Sequence plans, one small declarative file per model family, and the look-up of a model's plan."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from torch import nn

from raylight.parallel.plan import SequencePlan

from .exceptions import EXCEPTIONS, U_NET, WHOLE_BATCH


@functools.cache
def all_plans() -> dict[str, SequencePlan]:
    """Return every plan of this folder, by the import path of its model class.

    Raises ValueError: when a class has two plans.
    """
    plans: dict[str, SequencePlan] = {}
    for info in pkgutil.iter_modules(__path__):
        for plan in getattr(importlib.import_module(f"{__name__}.{info.name}"), "PLANS", ()):
            if plan.model in plans:
                raise ValueError(f"{plan.model} has two plans")
            plans[plan.model] = plan
    return plans


def has_known_rows(config: str) -> bool:
    """Return whether a model without a plan, by its class name in `comfy.supported_models`, is known to compute each
    batch row by itself and to keep nothing from forward to forward.
    """
    return EXCEPTIONS.get(config) == U_NET


def needs_whole_batch(config: str) -> bool:
    """Return whether a model without a plan, by its class name in `comfy.supported_models`, is known not to compute
    each batch row by itself.
    """
    return config in WHOLE_BATCH


def plan_for(model: nn.Module, config: str = "") -> SequencePlan:
    """Return the plan of a model's class. `config` is its class name in `comfy.supported_models`, if known.

    A subclass does not inherit its parent's plan: it may add streams that the plan does not have.

    Raises ValueError: when there is no plan; the message names the class and, if known, the reason.
    """
    return plan_of(type(model), config)


def plan_of(kind: type[nn.Module], config: str = "") -> SequencePlan:
    """Return the plan of a model class. All else as `plan_for`."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    plan = all_plans().get(name)
    if plan is None:
        reason = f" ({EXCEPTIONS[config]})" if config in EXCEPTIONS else ""
        raise ValueError(f"no sequence plan for {name}{reason}. What has one is listed in docs/models.md of Raylight")
    return plan
