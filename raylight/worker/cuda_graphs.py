"""CUDA graphs of the models of a worker: the forward of ComfyUI's model, within its wrappers, is replayed."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from raylight.host import torch_settings
from raylight.host.patcher_state import OPTIONS, OVERRIDE, bind_arguments, run_with_wrappers
from raylight.parallel.graph_capture import Backend, CudaBackend
from raylight.parallel.graph_pool import GraphPool
from raylight.parallel.graphs import OFF, ON, ForwardGraphs
from raylight.sharding.file_weight import FileWeight
from raylight.sharding.subclass_weights import flatten_tensor

from . import patcher
from .graph_obstacles import obstacle_in

logger = logging.getLogger(__name__)

# Options that have run around the forward when it is captured.
_OUTSIDE = ("wrappers", "callbacks")

_LEAST_FREE = 0.2

Announce = Callable[[tuple[Any, ...], dict[str, Any]], AbstractContextManager[bool]]
"""What is entered with the arguments of a forward around it, and gives whether it may be replayed."""

Decided = Callable[[tuple[Any, ...], dict[str, Any]], AbstractContextManager[None]]
"""What is entered with the arguments of a forward, around that."""

_pools: dict[torch.device, GraphPool] = {}


def pool_of(device: torch.device, backend: Callable[[torch.device], Backend] = CudaBackend) -> GraphPool:
    """Return the graphs of all models on a device."""
    device = _indexed(device)
    if device not in _pools:
        _pools[device] = GraphPool(backend(device))
    return _pools[device]


def has_graphs(device: torch.device) -> bool:
    """Return whether forwards on a device can be graphs."""
    return device.type == "cuda" or device in _pools


def _pool(device: torch.device) -> GraphPool | None:
    return _pools.get(_indexed(device)) if _pools else None


def _indexed(device: torch.device) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def release(device: torch.device) -> int:
    """Drop all graphs on a device, for memory that is needed; return how many bytes they kept to themselves."""
    pool = _pool(device)
    held = 0 if pool is None else pool.held_bytes
    if pool is not None:
        pool.drop_all()
    return held


def release_if_full(device: torch.device) -> None:
    """Drop all graphs on a GPU of which less than `least_free` is free, for other programs on it."""
    if held_bytes(device) > 0:
        if torch.cuda.mem_get_info(device)[0] < least_free(device):
            release(device)


def least_free(device: torch.device) -> int:
    """Return how many bytes of a GPU are for other programs, if one uses it: ComfyUI's nodes do not all ask for it."""
    return int(_LEAST_FREE * torch.cuda.mem_get_info(device)[1])


def held_bytes(device: torch.device) -> int:
    """Return how many bytes of a device graphs keep to themselves."""
    pool = _pool(device)
    return 0 if pool is None else pool.held_bytes


def number(device: torch.device) -> int:
    """Return how many graphs a device has."""
    pool = _pool(device)
    return 0 if pool is None else len(pool)


class GraphedForward:
    """A model whose forwards are replayed as graphs where they can be, until `remove`.

    A graph is of the model's `forward`, and the model's own hooks run around each replay. With weights that these hooks
    gather it is of the whole call, hooks included.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: GraphPool,
        split: Callable[[], Hashable],
        reset: Callable[[], None],
        way: Callable[[], Hashable] = lambda: None,
        is_measured: Callable[[], bool] = lambda: False,
        decided: Decided = lambda args, kwargs: nullcontext(),
    ) -> None:
        """Replace `model.forward`, and what a call of the model does.

        `split` returns what the split of its tokens depends on at this moment, and `reset` brings it back to the start
        of a forward. `way` returns what of it is decided before the model is called, by more than its arguments.
        `is_measured` is asked when a forward begins, and returns whether ranks exchange more in this one than in
        others, so that it must run as it is on all of them. `decided` is entered around each forward that may be
        replayed with the model's hooks, and decides what these would, `split` included.
        """
        self._model, self._split, self._way, self._is_measured = model, split, way, is_measured
        self._decided = decided
        self._paused = False
        self._own = model.forward
        self._replaced = vars(model).get("forward")
        self._graphs = ForwardGraphs(type(model).__name__, self._run, reset, pool)
        self._mode = OFF
        self._context: Hashable = None
        self._obstacle = ""
        self._moves = -1
        self._weights: tuple[Any, ...] = ()
        self._weights_obstacle = ""
        self._override: Any = None
        self._announce: Announce | None = None
        model.forward = functools.wraps(self._own)(functools.partial(self._forward))
        model._compiled_call_impl = self._call  # where `nn.Module` has a place for another call

    def remove(self) -> None:
        """Drop all graphs, and give the model its own forward again."""
        self._graphs.clear()
        self._model._compiled_call_impl = None
        del self._model.forward
        if self._replaced is not None:
            self._model.forward = self._replaced

    def use(self, mode: str, context: Hashable, obstacle: str, announce: Announce | None = None) -> None:
        """Replay the following forwards in this mode of `graphs.NAMES`, unless there is an `obstacle`. They depend on
        `context`, beside their arguments. With `announce` graphs have the model's hooks in them, and it is entered
        around each forward, whether it is replayed or not; but in mode `OFF`.
        """
        self._mode, self._context, self._obstacle, self._announce = mode, context, obstacle, announce
        if obstacle and mode != OFF:
            self._graphs.log(obstacle)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run all forwards within this context as they are: none is counted, captured or replayed."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @property
    def reasons(self) -> frozenset[str]:
        """Why forwards have run as they are."""
        return self._graphs.reasons

    @property
    def holds_any(self) -> bool:
        """Whether there is a graph of this model."""
        return self._graphs.holds_any

    @property
    def expects_any(self) -> bool:
        """Whether forwards as the last ones are, or may become, graphs."""
        return self._mode != OFF and not self._obstacle and self._graphs.expects_any

    def drop(self) -> None:
        """Drop all graphs of this model."""
        self._graphs.clear()

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]) -> Any:
        if self._override is not None:
            options[OVERRIDE] = self._override
        run = self._own if self._announce is None else self._model._call_impl
        return run(*args, **kwargs, **{OPTIONS: options})

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        own = self._model._call_impl
        if self._announce is None or self._must_run():
            return own(*args, **kwargs)
        with self._decided(args, kwargs), self._announce(args, kwargs) as may_replay:
            return self._graphed(own, args, kwargs) if may_replay else own(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._announce is not None or self._must_run():
            return self._own(*args, **kwargs)
        return self._graphed(self._own, args, kwargs)

    def _must_run(self) -> bool:
        """Return whether the forward that begins runs as it is on every rank. To be asked once."""
        # What compiles the model would look into this, and can do without.
        if self._paused or torch.compiler.is_compiling():
            return True
        return self._is_measured() or self._mode == OFF

    def _graphed(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replay what `own` does if it can be a graph, else do it."""
        if self._obstacle:
            return own(*args, **kwargs)
        found = obstacle_in(kwargs.get(OPTIONS) or {}) or self._obstacle_of_weights()
        if found:
            self._graphs.log(found)
            return own(*args, **kwargs)
        return run_with_wrappers(self._model, self._within_wrappers, args, kwargs)

    def _within_wrappers(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = bind_arguments(type(self._model).forward, self._model, args, kwargs)
        options = {name: value for name, value in (kwargs.pop(OPTIONS, None) or {}).items() if name not in _OUTSIDE}
        # Ours, and a new one for each job. What it does is in the context.
        self._override = options.pop(OVERRIDE, None)
        context = self._context, self._way(), self._split(), self._override is not None
        try:
            return self._graphs.call(context, self._weight_tensors, self._mode == ON, args, kwargs, options)
        finally:
            self._override = None

    def _weight_tensors(self) -> list[Tensor]:
        """Return the plain tensors that the model's weights and buffers consist of, of sharded ones this rank's."""
        return [part for tensor in (*self._model.parameters(), *self._model.buffers()) for part in _parts(tensor)]

    def _obstacle_of_weights(self) -> str:
        """Return why graphs cannot use the weights where they are now. Drop graphs of weights that have moved or were
        replaced since, as graphs know where they were.
        """
        if self._moves != patcher.moves():
            self._moves = patcher.moves()
            device, tensors = self._graphs.device, self._weight_tensors()
            where = (torch_settings.read(), *((_address(tensor), tensor.dtype) for tensor in tensors))
            if where != self._weights:
                self._graphs.clear()
                self._weights = where
            elsewhere = sum(
                part.device != device and (isinstance(part, FileWeight) or not part.is_pinned())
                for parameter in self._model.parameters()
                for part in _parts(parameter)
            )
            self._weights_obstacle = (
                f"{elsewhere} of its weights are in system memory, as the GPU has no room for them" if elsewhere else ""
            )
        return self._weights_obstacle


def _parts(tensor: Tensor) -> Iterable[Tensor]:
    if isinstance(tensor, DTensor):
        tensor = tensor._local_tensor
    flat = None if type(tensor) in (Tensor, nn.Parameter) else flatten_tensor(tensor)
    return (tensor,) if flat is None else flat.components.values()


def _address(tensor: Tensor) -> int:
    """Return where a tensor is; 0 for one that is still in its file."""
    return 0 if isinstance(tensor, FileWeight) else tensor.data_ptr()
