"""What nodes have put into the model, for forwards that are sent one by one.

It is sent once in a run, so that code on the workers keeps what it computes. A value that is another one in a later
forward, or the same object with other content, is sent with that forward.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from raylight.cluster.serialization import SerializedObject
from raylight.host.foreign_code import is_foreign_file, is_foreign_function, node_name_of
from raylight.host.jobs import AS_SENT
from raylight.host.patcher_state import OVERRIDE, Change, PatcherState
from raylight.host.pickling import NotSerializableError, serialize

from .shared_state import names_used

# Options that are called inside the model, and those that run in this process, around the call.
_CODE, _OUTSIDE = ("patches", "patches_replace", OVERRIDE), ("wrappers", "callbacks")
_PLAIN = (bool, int, float, str, bytes, Tensor, torch.dtype, torch.device, torch.Size, uuid.UUID)
# Values, and methods, which are made anew when they are asked for.
_COMPARED = (bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size, uuid.UUID, MethodType)
# Of larger tensors, which are weights of networks, no copy is kept to compare them with.
_COMPARED_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Extras:
    """What nodes have set on a model and in the options of a forward.

    `state` is the patcher's, `code` the options that are called inside the model, `values` other options of nodes,
    which that code may use, and `data` plain ones, which the model reads.
    """

    state: PatcherState
    code: Mapping[str, Any]
    values: Mapping[str, Any]
    data: Mapping[str, Any]
    changes: Sequence[Change]

    @classmethod
    def of(cls, state: PatcherState, options: Mapping[str, Any], changes: Sequence[Change]) -> Extras:
        """Sort the options of a forward."""
        code = {name: options[name] for name in _CODE if options.get(name)}
        rest = {name: value for name, value in options.items() if name not in _OUTSIDE and name not in _CODE}
        data = {name: value for name, value in rest.items() if _is_plain(value)}
        found = cls(state, code, {name: value for name, value in rest.items() if name not in data}, data, changes)
        return found if found.has_code else replace(found, values={})

    @property
    def has_code(self) -> bool:
        """Whether code of nodes runs in the model."""
        return bool(self.code or self.changes or self.state["object_patches"])

    @property
    def values_by_place(self) -> dict[Any, Any]:
        """Options and changes that are no code of the model, by what they are set on."""
        plain = {(one.owner, one.name): one.value for one in self.changes if _is_plain(one.value)}
        return {**self.values, **plain}


class SentExtras:
    """The extras of a run as they were sent, under `key`."""

    def __init__(self, extras: Extras, patcher: ModelPatcher) -> None:
        self.key = f"extras-{uuid.uuid4().hex}"
        self._code = _Content(_code_of(extras, patcher), patcher)
        self._values = {place: _Content(value, patcher) for place, value in extras.values_by_place.items()}

    def has_code_of(self, extras: Extras, patcher: ModelPatcher) -> bool:
        """Return whether the code is as it was sent, and all that it reaches."""
        return self._code.is_still(_code_of(extras, patcher), patcher)

    def others(self, extras: Extras, patcher: ModelPatcher) -> tuple[dict[str, Any], list[Change]]:
        """Return options and changes of a later forward, with AS_SENT in the place of values that are as they were."""
        same = {
            place
            for place, value in extras.values_by_place.items()
            if place in self._values and self._values[place].is_still(value, patcher)
        }
        values = {name: AS_SENT if name in same else value for name, value in extras.values.items()}
        is_code = [not _is_plain(one.value) for one in extras.changes]
        changes = [
            replace(one, value=AS_SENT) if code or (one.owner, one.name) in same else one
            for one, code in zip(extras.changes, is_code, strict=True)
        ]
        return values, changes

    def serialized(self, extras: Extras, patcher: ModelPatcher) -> SerializedObject:
        """Serialize what is sent once. Raises ValueError, naming the node: for what cannot be sent."""
        content = extras.state, extras.code, extras.values, extras.changes
        with naming_the_node(extras, patcher):
            return serialize(content, patcher, foreign_code=True)


def sent_extras(before: SentExtras | None, extras: Extras, patcher: ModelPatcher, begins_run: bool) -> SentExtras:
    """Return what the workers are to have of a forward's extras: those sent before, unless it begins a run or their
    code is another.
    """
    if before is not None and not begins_run and before.has_code_of(extras, patcher):
        return before
    return SentExtras(extras, patcher)


def _code_of(extras: Extras, patcher: ModelPatcher) -> Any:
    changes = [(one.owner, one.name, one.value) for one in extras.changes if not _is_plain(one.value)]
    return extras.state, extras.code, str(patcher.patches_uuid), changes


@dataclass(frozen=True, slots=True)
class _Place:
    """Stands for a tensor or a function in a pickle."""

    number: int


class _Content:
    """A value as it is now, to tell later whether it still is: the objects in it, its pickle, and copies of tensors.

    An equal object is not enough: code that is made anew for each step has not kept anything.
    """

    def __init__(self, value: Any, patcher: ModelPatcher) -> None:
        self._objects = list(_leaves(value))
        self._data, tensors = _pickled(value, patcher)
        # What pickles otherwise each time cannot be compared by that.
        self._repeats = self._data == _pickled(value, patcher)[0]
        self._tensors = [(one, one.detach().clone() if one.nbytes <= _COMPARED_BYTES else None) for one in tensors]

    def is_still(self, value: Any, patcher: ModelPatcher) -> bool:
        """Return whether `value` has the same objects, and what they reach is as it was."""
        objects = list(_leaves(value))
        if len(objects) != len(self._objects) or not all(map(_is_same, objects, self._objects)):
            return False
        data, tensors = _pickled(value, patcher)
        if self._repeats and (data != self._data or len(tensors) != len(self._tensors)):
            return False
        return all(
            now is then if copy is None else _equal(now, copy)
            for now, (then, copy) in zip(tensors, self._tensors, strict=False)
        )


def _is_same(now: Any, then: Any) -> bool:
    return now is then or (isinstance(now, _COMPARED) and type(now) is type(then) and bool(now == then))


def _pickled(value: Any, patcher: ModelPatcher) -> tuple[bytes, list[Tensor]]:
    """Return the pickle of a value without the tensors in it, and these.

    Of a pack's function it has what the function reaches: to pickle one looks through all imported modules.
    """
    tensors: dict[int, Tensor] = {}
    functions: dict[int, FunctionType] = {}
    places: dict[int, _Place] = {}
    rest, data = [value], []

    def refer(item: Any) -> _Place | None:
        if type(item) in (Tensor, nn.Parameter) and item.layout == torch.strided:
            tensors[id(item)] = item
        elif not isinstance(item, FunctionType) or not is_foreign_function(item):
            return None
        elif id(item) not in functions:
            functions[id(item)] = item
            rest.append(_reached(item))
        return places.setdefault(id(item), _Place(len(places)))

    while rest:
        with suppress(NotSerializableError):  # which is told when it is sent
            data.append(serialize(rest.pop(), patcher, foreign_code=True, also=refer).data)
    return b"".join(data), list(tensors.values())


def _reached(function: FunctionType) -> Any:
    """Return what a function uses. Its code is told by its number: code that is made anew is not the same."""
    cells = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # not set yet
            cells.append(cell.cell_contents)
    names = sorted(name for name in names_used(function.__code__) if name in function.__globals__)
    space = [(name, _without_code(function.__globals__[name])) for name in names]
    return id(function.__code__), cells, function.__defaults__, function.__kwdefaults__, vars(function), space


def _without_code(value: Any) -> Any:
    """Return the plain variables of a pack's module, nothing of another module, and anything else as it is."""
    if not isinstance(value, ModuleType):
        return value
    is_of_a_pack = is_foreign_file(getattr(value, "__file__", None) or "")
    return {name: one for name, one in vars(value).items() if _is_plain(one)} if is_of_a_pack else None


def _equal(first: Tensor, second: Tensor) -> bool:
    """Return whether tensors have the same bits."""
    if (first.shape, first.dtype, first.device) != (second.shape, second.dtype, second.device):
        return False
    bits = [one.detach().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8) for one in (first, second)]
    return torch.equal(*bits)


@contextmanager
def naming_the_node(extras: Extras, patcher: ModelPatcher) -> Iterator[None]:
    """Raise ValueError that names the node of what cannot be sent."""
    try:
        yield
    except NotSerializableError as error:
        content = extras.code, extras.values, extras.state, [change.value for change in extras.changes]
        for value in _leaves(content):
            try:
                serialize(value, patcher, foreign_code=True)
            except NotSerializableError as reason:
                raise ValueError(
                    f"{node_name_of(value)} changes the inside of the model in a way that cannot be sent to the "
                    f"workers ({reason}): remove it, or take the model from one of ComfyUI's loaders"
                ) from error
        raise ValueError(f"what nodes have put into the model cannot be sent to the workers: {error}") from error


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple, set)):
        return value is None or isinstance(value, _PLAIN)
    return all(_is_plain(item) for item in value)
