"""Attention overrides of packs that are kernels, and so do with each head and each query what they do with any."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType
from typing import Any

import comfy.model_patcher
from torch import nn

from raylight.host.foreign_code import is_foreign, is_foreign_function, node_name_of
from raylight.host.jobs import Inside
from raylight.host.patcher_state import HOOKS, Change
from raylight.parallel.plan import SequencePlan
from raylight.plans import plan_of
from raylight.worker.transformer_options import OVERRIDE

from . import weightless
from .baseline import INNER
from .remote_model import RemotePatcher

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
        functions += [
            value
            for value in values
            if isinstance(value, (FunctionType, MethodType))
            and (is_foreign(value) or _LIBRARIES.search(value.__name__))
        ]
        names |= {value.__name__ for value in values if isinstance(value, (FunctionType, MethodType))}
    return names


def _used(code: CodeType) -> set[str]:
    names = {*code.co_names, *code.co_freevars}
    for const in code.co_consts:
        if isinstance(const, CodeType):
            names |= _used(const)
    return names


logger = logging.getLogger(__name__)

_BY_TOKEN = re.compile(r"(?:^|\.)(?:ffn|ff|ff_\w+|\w*mlp\w*|feed_forward\w*|\w*norm\w*)(?:\.|$)", re.IGNORECASE)
_LAYERS = ("torch.nn.", "comfy.ops")
_INNER = f"{INNER}."
_told: set[str] = set()


def inside_of(patcher: RemotePatcher, changes: Sequence[Change]) -> Inside:
    """What nodes have put inside of the diffusion model by this patcher, and past it by `changes`."""
    model = patcher.model.diffusion_model
    try:
        # By its own class: a node may have given it another.
        plan = plan_of(weightless.baseline_of(patcher.model).diffusion_model, type(patcher.model.model_config).__name__)
    except ValueError:  # nothing is split then
        return Inside()
    override = patcher.model_options.get("transformer_options", {}).get(OVERRIDE)
    # A ring merges parts by their log-sum-exp.
    if override is not None and (patcher.workers.config.mesh.ring > 1 or not is_kernel(override)):
        return Inside(_named(override, OVERRIDE))
    split = _region(plan)
    watched: list[str] = []
    by_token: list[str] = []
    for path, code in (*_patched(patcher), *_changed(changes)):
        if path is None:
            return Inside(_named(code, ""))
        module = _submodule(model, path)
        if _is_own(module, code):
            continue
        if _works_by_token(path, module, code):
            by_token.append(path)
            continue
        if path == "" or split.matches(path):
            return Inside(_named(code, path))
        watched.append(path)
    return Inside("", tuple(dict.fromkeys(watched)), tuple(dict.fromkeys(by_token)))


def begin() -> None:
    """To be called when a run begins: what it asks for is told once."""
    _told.clear()


def tell(inside: Inside, ranks: int) -> None:
    """Say once in a run what whole tokens cost."""
    if inside.full_tokens_for and ranks > 1 and inside.full_tokens_for not in _told:
        _told.add(inside.full_tokens_for)
        logger.warning(
            "%s has put code inside of the model that has to see all tokens. The result is right, but the workers do "
            "not split tokens then, so each does the work of all: remove the node to sample faster, or use cfg_degree "
            "or dp_degree, which split none",
            inside.full_tokens_for,
        )


def _patched(patcher: comfy.model_patcher.ModelPatcher) -> Iterator[tuple[str | None, Any]]:
    """Where code is put into the diffusion model, by the path of the module, and the code."""
    for key, value in patcher.object_patches.items():
        if not key.startswith(_INNER):
            continue
        path = key.removeprefix(_INNER)
        if isinstance(value, nn.Module):
            yield path, value
        elif callable(value):
            yield path.rpartition(".")[0], value
    for injections in patcher.injections.values():
        for one in injections:
            if is_foreign_function(getattr(one.inject, "__func__", one.inject)):
                yield None, one.inject


def _changed(changes: Sequence[Change]) -> Iterator[tuple[str | None, Any]]:
    for change in changes:
        if not isinstance(change.owner, str) or change.owner.startswith("python:"):
            yield None, change.value
        elif (change.owner + ".").startswith(_INNER) and (callable(change.value) or change.name in HOOKS):
            yield change.owner.removeprefix(INNER).lstrip("."), change.value


@dataclass(frozen=True, slots=True)
class _Region:
    """The modules that a plan names, what is below them, and what holds them."""

    at_or_below: re.Pattern[str]
    above: frozenset[str]

    def matches(self, path: str) -> bool:
        return bool(self.at_or_below.match(path)) or re.sub(r"\d+", "*", path) in self.above


def _region(plan: SequencePlan) -> _Region:
    paths = {path.replace(".-1", ".*") for path in (*plan.inputs, *plan.attention, *plan.outputs) if path}
    expression = "|".join(re.escape(path).replace(r"\*", r"\d+") for path in sorted(paths))
    above = {path[: at.start()] for path in paths for at in re.finditer(r"\.", path)}
    return _Region(re.compile(rf"(?:{expression})(?:\.|$)"), frozenset(above))


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _is_own(module: nn.Module | None, code: Any) -> bool:
    """Whether it is the model's own code, at most compiled."""
    code = getattr(code, "_orig_mod", getattr(code, "_torchdynamo_orig_callable", code))
    if isinstance(code, MethodType):
        return code.__self__ is module and code.__func__ is getattr(type(module), code.__func__.__name__, None)
    return code is module and module is not None


def _works_by_token(path: str, module: nn.Module | None, code: Any) -> bool:
    if _BY_TOKEN.search(path):
        return True
    if isinstance(code, nn.Module) and not _is_layer(code):
        return False
    return module is not None and _is_layer(module)


def _is_layer(module: nn.Module) -> bool:
    kind = type(module)
    return f"{kind.__module__}.".startswith(_LAYERS) and not isinstance(
        module, (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    )


def _named(code: Any, place: str) -> str:
    node = node_name_of(getattr(code, "_torchdynamo_orig_callable", code))
    return f"{node} (at {place})" if place else node
