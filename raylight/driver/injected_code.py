"""Code that nodes put inside a diffusion model: whether it may see a shard of the tokens, or needs all of them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType
from typing import Any

import comfy.model_patcher
from torch import nn

from raylight.host.foreign_code import is_foreign, is_foreign_function, node_name_of
from raylight.host.jobs import Inside
from raylight.host.patcher_state import HOOKS, OVERRIDE, Change
from raylight.parallel.plan import SequencePlan
from raylight.plans import plan_of
from raylight.plans.exceptions import EXCEPTIONS

from . import weightless
from .beside_model import INNER
from .remote_model import RemotePatcher

logger = logging.getLogger(__name__)

_WRAPPED = ("func", "_torchdynamo_orig_callable", "__wrapped__")
_LIBRARIES = re.compile(r"sage_?att|flash_?att|xformers|memory_efficient_attention|sparge_?att", re.IGNORECASE)


def is_kernel(override: Any) -> bool:
    """Return whether an attention override works on any subset of the heads, and in cross attention of the queries.

    ComfyUI's own do. A pack's does if it calls a library of attention kernels, which packs add by an override for
    speed; any other may use heads and tokens by their index.
    """
    return not _is_foreign(override) or any(_LIBRARIES.search(name) for name in _names(override))


def _is_foreign(value: Any) -> bool:
    """Return whether it is code of a pack, also behind a decorator of ComfyUI's, as attention functions are."""
    return is_foreign(value) or any(_is_foreign(getattr(value, name)) for name in _WRAPPED if hasattr(value, name))


def _names(function: Any) -> set[str]:
    """Return the names that a function uses, and those that the packs' functions use that it calls."""
    names: set[str] = set()
    seen: set[FunctionType] = set()
    rest = [function]
    while rest:
        one = rest.pop()
        rest += [getattr(one, name) for name in _WRAPPED if hasattr(one, name)]
        if isinstance(one, MethodType):
            one = one.__func__
        if not isinstance(one, FunctionType):
            one = vars(type(one)).get("__call__")
        if not isinstance(one, FunctionType) or one in seen:
            continue
        seen.add(one)
        used = _names_in(one.__code__)
        called = [
            value
            for value in (*map(one.__globals__.get, used), *_closed_over(one))
            if isinstance(value, (FunctionType, MethodType))
        ]
        names |= used | {value.__name__ for value in called}
        rest += [value for value in called if _is_foreign(value) or _LIBRARIES.search(value.__name__)]
    return names


def _closed_over(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # not set yet
            yield cell.cell_contents


def _names_in(code: CodeType) -> set[str]:
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return {*code.co_names, *code.co_freevars}.union(*map(_names_in, inner))


_BY_TOKEN = re.compile(r"(?:^|\.)(?:ffn|ff|ff_\w+|\w*mlp\w*|feed_forward\w*|\w*norm\w*)(?:\.|$)", re.IGNORECASE)
_LAYERS = ("torch.nn.", "comfy.ops")
_INNER = f"{INNER}."
_warned_of: set[str] = set()


def inside_of(patcher: RemotePatcher, changes: Sequence[Change]) -> Inside:
    """Return what code of nodes inside the diffusion model needs, put there by this patcher or by `changes`."""
    model, workers = patcher.model.diffusion_model, patcher.workers.config
    config = type(patcher.model.model_config).__name__
    try:
        # By its own class: a node may have given it another.
        plan = plan_of(weightless.baseline_of(patcher.model).diffusion_model, config)
    except ValueError:
        plan = None
    if plan is None and (config in EXCEPTIONS or not workers.may_split_tokens):
        return Inside()
    override = patcher.model_options.get("transformer_options", {}).get(OVERRIDE)
    # A ring needs the log-sum-exp of each block, which an override does not return.
    if override is not None and (workers.mesh.ring > 1 or not is_kernel(override)):
        return Inside(_named(override, OVERRIDE))
    split = None if plan is None else _split_region(plan)
    # As dicts, to keep their order without repetition.
    watched: dict[str, None] = {}
    by_token: dict[str, None] = {}
    for path, code in (*_patched(patcher), *_changed(changes)):
        if path is None:
            return Inside(_named(code, ""))
        module = _submodule(model, path)
        if _is_own(module, code):
            continue
        if split is not None and _works_by_token(path, module, code):
            by_token[path] = None
            continue
        # What a plan that the workers draft was proven with is the model without code of nodes.
        if path == "" or split is None or split.matches(path):
            return Inside(_named(code, path))
        watched[path] = None
    return Inside("", tuple(watched), tuple(by_token))


def begin() -> None:
    """Begin a run: `warn_of_full_tokens` warns once in each."""
    _warned_of.clear()


def warn_of_full_tokens(inside: Inside, ranks: int) -> None:
    """Log once in a run what full tokens cost."""
    if inside.full_tokens_for and ranks > 1 and inside.full_tokens_for not in _warned_of:
        _warned_of.add(inside.full_tokens_for)
        logger.warning(
            "%s has put code inside the model that needs all tokens. The result is right, but the workers do not split "
            "tokens then, so each does the work of all: remove the node to sample faster, or use cfg_degree or "
            "dp_degree, which do not split tokens",
            inside.full_tokens_for,
        )


def _patched(patcher: comfy.model_patcher.ModelPatcher) -> Iterator[tuple[str | None, Any]]:
    """Yield the path of the module where code was put into the diffusion model, None if unknown, and the code."""
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
    """The modules that a plan names, those below them, and those that contain them."""

    at_or_below: re.Pattern[str]
    above: frozenset[str]

    def matches(self, path: str) -> bool:
        return bool(self.at_or_below.match(path)) or re.sub(r"\d+", "*", path) in self.above


def _split_region(plan: SequencePlan) -> _Region:
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
    """Return whether it is the module's own code, compiled or not."""
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
