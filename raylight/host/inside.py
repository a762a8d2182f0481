"""Code that nodes have put inside of a diffusion model, and what that asks of workers that split its tokens.

The rule, for object patches, injections and changes of the model itself alike. Where a module holds split tokens, at or
below it, code of a node is given whole tokens: no worker splits any then. It may see split ones where it stands for
something that works on each token by itself (feed-forward layers, norms, linear layers), and is nothing new where it is
the model's own code again, compiled for example. What stands beside the modules that a plan names is called before
tokens are split, which workers watch.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import comfy.model_patcher
from torch import nn

from raylight.parallel.plan import SequencePlan
from raylight.plans import plan_of

from . import skeleton
from .as_built import INNER
from .attention_hook import OVERRIDE
from .attention_kernels import is_kernel
from .changes import HOOKS, Change
from .foreign_code import is_foreign_function
from .job import Inside
from .origin import origin
from .remote_patcher import RemotePatcher

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
        plan = plan_of(skeleton.as_built(patcher.model).diffusion_model, type(patcher.model.model_config).__name__)
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
    if inside.whole and ranks > 1 and inside.whole not in _told:
        _told.add(inside.whole)
        logger.warning(
            "%s has put code inside of the model that has to see all tokens. The result is right, but the workers do "
            "not split tokens then, so each does the work of all: remove the node to sample faster, or use cfg_degree "
            "or dp_degree, which split none", inside.whole)


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
    above = {path[:at.start()] for path in paths for at in re.finditer(r"\.", path)}
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
        module, (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))


def _named(code: Any, place: str) -> str:
    node = origin(getattr(code, "_torchdynamo_orig_callable", code))
    return f"{node} (at {place})" if place else node
