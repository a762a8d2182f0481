"""The ranks' work in tests of what stays gathered as far as memory allows, on GPUs whose memory is simulated."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from comfy.cli_args import args

args.cpu = not torch.cuda.is_available()  # before ComfyUI picks a device

import comfy.lora
from counting import gathered
from gathering_cases import BLOCKS, CPU, nets
from sharded_cases import _patched_by_comfyui, two_loras
from torch import Tensor

from raylight.dev.zoo import families
from raylight.dev.zoo.family import Draw
from raylight.host.checkpoint import MappedModel
from raylight.parallel.mesh import MeshShape, build_mesh, world_axis
from raylight.parallel.process_group import smallest
from raylight.sharding.fsdp import gathering_of, reset
from raylight.sharding.gathering import Gathering
from raylight.worker import kept_units, lora, sharded_patcher
from raylight.worker.forward_kinds import copied
from raylight.worker.kept_units import NO_GRAPHS, GraphsOfJob, KeptUnits
from raylight.worker.sharded_patcher import build_sharded

ORDER = tuple(range(BLOCKS))
RESERVE = 100
PER_ROW = 1000  # bytes that a forward takes
LARGE = 1 << 40


class SimulatedMemory:
    """A GPU of `size` bytes that has kept units, and in forwards `needed` bytes beside those of weights."""

    def __init__(self, size: int, gathering: Gathering | None = None) -> None:
        self.size, self.gathering, self.needed, self.held = size, gathering, 0, 0
        self.measured = 0

    def begin(self) -> None:
        assert not self._kept, "a forward is measured with nothing kept"
        self.measured += 1

    def taken(self) -> int:
        return self.needed + (0 if self.gathering is None else self.gathering.passing_bytes(0))

    def left(self) -> int:
        return self.size - self._kept - self.held

    def graphs(self) -> int:
        return self.held

    def tidy(self) -> None:
        pass

    @property
    def _kept(self) -> int:
        return 0 if self.gathering is None else self.gathering.kept_bytes(self.gathering.number)


@dataclass
class Ran:
    """Whether a forward gave the net's result, the units that it gathered, and how many are kept after it."""

    equal: bool
    gathers: int
    number: int


class Job:
    """A sharded net of which units are kept, beside the whole one."""

    def __init__(self, world: int, room: int, offload: bool = False, wanted: int = 0) -> None:
        """`room` is what this rank has for weights beside a forward of 2 rows."""
        self.whole, self.net, _ = nets(world, offload, CPU)
        self.gathering = gathering_of(self.net)
        forward = int(RESERVE + 1.1 * PER_ROW * 2)
        self.memory = SimulatedMemory(room + forward, self.gathering)
        self.kept = KeptUnits("a net", self.gathering, dist.group.WORLD, self.memory)
        self.wanted = wanted
        self.begin()

    def begin(
        self, may_keep: bool = True, begins_run: bool = True, context: Any = "", graphs: GraphsOfJob = NO_GRAPHS
    ) -> None:
        self.kept.begin(may_keep, begins_run, context, lambda: None, lambda: self.wanted, graphs)

    def forward(self, rows: int = 2) -> Ran:
        x = torch.linspace(-1, 1, 6 * rows).view(rows, 6)
        self.memory.needed = PER_ROW * rows
        with (
            torch.no_grad(),
            gathered() as units,
            patch.object(kept_units, "minimum_inference_memory", lambda: RESERVE),
            patch.object(kept_units, "MARGIN_BYTES", 0),
        ):
            actual = self.net(x, ORDER)
        return Ran(torch.equal(actual, self.whole(x, ORDER)), len(units), self.gathering.number)

    def forwards(self, count: int, rows: int = 2) -> list[Ran]:
        return [self.forward(rows) for _ in range(count)]


def sizes(world: int) -> list[int]:
    """Return the bytes that weights take within a forward, by the number of kept units."""
    gathering = gathering_of(nets(world, False, CPU)[1])
    return [gathering.kept_bytes(number) + gathering.passing_bytes(number) for number in range(2 + BLOCKS)]


def with_rooms(rank: int, world: int, numbers: list[int], offload: bool) -> list[Ran]:
    """Return what forwards do on ranks of which each has room for a number of kept units."""
    gathering = gathering_of(nets(world, offload, CPU)[1])
    number = numbers[rank]
    room = gathering.kept_bytes(number) + gathering.passing_bytes(number) if number else 0
    job = Job(world, room, offload)
    first = job.forwards(5)
    job.begin()
    return [*first, *job.forwards(2)]


def beside_graphs(rank: int, world: int, come_first: bool, held: int) -> list[int]:
    """Return how many units stay where the last rank expects graphs, which hold `held` bytes there already: with room
    for a graph and all units, and with a byte less.
    """
    found, has_graphs = [], rank == world - 1
    for less in (0, 1):
        job = Job(world, sizes(world)[-1] + int(1.1 * PER_ROW * 2) - less)
        job.memory.held = held if has_graphs else 0
        job.begin(graphs=GraphsOfJob(lambda: has_graphs, come_first))
        found.append(job.forwards(3)[-1].number)
    return found


def larger_ones(rank: int, world: int) -> list[Ran]:
    """Return what forwards do of which the 6th is larger, and those from the 9th on are smaller again."""
    job = Job(world, sizes(world)[2] + int(1.1 * PER_ROW) if rank else LARGE)
    found = [*job.forwards(5), *job.forwards(3, rows=3), *job.forwards(2), job.forward(rows=1)]
    job.begin()  # a run without the larger ones, and another one
    found += job.forwards(2, rows=1)
    job.begin()
    return [*found, *job.forwards(2)]


def released_on_one(rank: int, world: int) -> list[Ran]:
    """Return what forwards do before and after one rank has lost what it kept."""
    job = Job(world, LARGE)
    found = job.forwards(4)
    if rank == 1:
        job.kept.release()
    job.begin()
    return [*found, *job.forwards(2)]


def without_memory_on_one(rank: int, world: int) -> list[Ran]:
    """Return what forwards do where one rank finds no memory for what all have agreed on, and later does."""
    job, keep = Job(world, LARGE), Gathering.keep

    def fail(gathering: Gathering, number: int) -> None:
        keep(gathering, number)
        if number and rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

    with patch.object(Gathering, "keep", fail):
        found = job.forwards(4)
    job.begin()
    return [*found, *job.forwards(2)]


def failed_on_one(rank: int, world: int) -> list[Ran]:
    """Return what forwards do after two, which are measured, have failed on one rank when it had gathered all."""
    job = Job(world, LARGE)
    handle = job.net.blocks[4].register_forward_hook(_raise) if rank else None
    for _ in range(2):
        with suppress(ValueError):
            job.forward()
    if handle is not None:
        handle.remove()
        reset(job.net)
    return job.forwards(5)


def _raise(*_: Any) -> None:
    raise ValueError("simulated fault")


def of_jobs(rank: int, world: int) -> dict[str, list[Ran]]:
    """Return what forwards do in jobs of other kinds, one after another."""
    job = Job(world, LARGE)
    found = {"first": job.forwards(4)}
    job.begin(begins_run=False)
    found["the next step by itself"] = [job.forward()]
    job.wanted = job.memory.size - sizes(world)[2] if rank else 0
    job.begin(begins_run=False)
    found["memory is wanted on one rank"] = job.forwards(2)
    job.wanted = 0
    job.begin(may_keep=False)
    found["none may be kept"] = job.forwards(2)
    job.begin()
    found["as at first"] = job.forwards(2)
    job.begin(context="another")
    found["in another context"] = job.forwards(3)
    return found


def lost_before_a_method(rank: int, world: int, offload: bool) -> list[tuple[bool, int]]:
    """Return for calls of a method that gathers weights, as models have it for their text, whether each gave the whole
    model's result, and the units that it gathered: with all units kept, and after one rank has moved the model away.
    """
    family = families()["Wan T2V"]
    model, whole = family.build(), family.build()
    make = next(iter(family.calls.values()))
    inner = model.diffusion_model
    inner.preprocess_text_embeds = lambda text: inner.text_embedding(text)
    text = Draw(1)(1, 11, inner.text_embedding[0].weight.shape[1])
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    mapped = MappedModel(model, {}, CPU, {}, shapes)
    with patch.object(sharded_patcher, "spare_memory", lambda _: SimulatedMemory(LARGE)):
        patcher, _ = build_sharded(mapped, world_axis(build_mesh(MeshShape(batch=world), CPU)), offload)
    patcher.offload_device = torch.device("cpu", 0)
    found = []
    with torch.no_grad():
        for turn in range(3):
            own = patcher.clone()
            own.read_released()
            patcher.weights.kept.begin(True, True, "", lambda: None, lambda: 0)
            own.partially_load(CPU)
            for _ in range(2):
                with gathered() as units:
                    equal = torch.equal(inner.preprocess_text_embeds(text), whole.diffusion_model.text_embedding(text))
                found.append((equal, len(units)))
            for _ in range(3):
                model.apply_model(**copied(make(Draw(3))))
            if turn == 1 and rank == 0:
                patcher.detach()
            assert smallest(rank + turn) == turn, "all ranks are here"
    return found


def with_loras(rank: int, world: int, offload: bool) -> list[tuple[bool, int, int]]:
    """Return for the forwards of a model of ComfyUI's, before and after it has LoRAs and has left its device: whether
    the result is that of ComfyUI, the units that are gathered, and the bytes that are kept.
    """
    family = families()["Wan T2V"]
    model = family.build()
    make = next(iter(family.calls.values()))
    plain = model.apply_model(**make(Draw(3)))
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    loras = two_loras(shapes)
    with_all = _patched_by_comfyui(model, loras, make)
    mapped = MappedModel(model, {}, CPU, comfy.lora.model_lora_keys_unet(model, {}), shapes)
    with patch.object(sharded_patcher, "spare_memory", lambda _: SimulatedMemory(LARGE)):
        patcher, _ = build_sharded(mapped, world_axis(build_mesh(MeshShape(batch=world), CPU)), offload)
    patched = patcher.clone()
    for index, (tensors, strength) in enumerate(loras):
        fitted = lora.fit_lora(f"LoRA {index}", tensors, mapped.lora_keys, lora.WeightShapes(shapes))
        patched.add_patches(fitted.patches, strength)
    patcher.weights.kept.begin(True, True, "", lambda: None, lambda: 0)
    found = []

    def forwards(expected: Tensor, count: int) -> None:
        for _ in range(count):
            with torch.no_grad(), gathered() as units:
                actual = model.apply_model(**copied(make(Draw(3))))
            found.append((torch.equal(actual, expected), len(units), patcher.kept_bytes))

    def begin(other: Any) -> None:
        other.partially_load(CPU)
        patcher.weights.kept.begin(True, True, "", lambda: None, lambda: 0)

    forwards(plain, 4)
    begin(patched)
    forwards(with_all, 2)
    begin(patcher.clone())
    forwards(plain, 2)
    patcher.offload_device = torch.device("cpu", 0)
    patcher.detach()
    found.append((True, 0, patcher.kept_bytes))
    patcher.read_released()
    begin(patcher.clone())
    forwards(plain, 2)
    return found
