"""The text of Raylight Advice: what fits where, which degrees, how fast that should be, and what was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from raylight.attention import kernels
from raylight.cluster import active_session, memory_check, speed_check, unlike_workers
from raylight.cluster.config import SessionConfig
from raylight.cluster.session import Session
from raylight.host.log_messages import gb
from raylight.host.machine_memory import total_memory
from raylight.host.recipe import ModelRecipe, RayModel, WorkerConfig
from raylight.host.worker_service import WorkerService
from raylight.parallel.degrees import Arrangement, Choice, Limits, choose, speed_up
from raylight.parallel.estimate import SENT_BYTES, SENT_BYTES_IN_8_BITS, Hardware, forward_s
from raylight.parallel.external_strategies import OURS_INT8, is_ours
from raylight.parallel.memory_shares import held_by_each
from raylight.parallel.mesh import MeshShape
from raylight.parallel.shares import Weights

from . import step_times, weightless
from .model_forward import forward_on_workers
from .model_size import ModelSize, measure
from .status import how
from .workers import ask_all

_AROUND = 1.5e9  # bytes of a GPU for CUDA, NCCL and what fragments
_GATHERED = 3  # blocks that a rank has in full at once with FSDP
_SHOWN = 5  # runs
_FORWARDS = ((1, "without CFG"), (2, "with CFG, prompts of one length"))


@dataclass(frozen=True, slots=True)
class _Cards:
    """What is known of the workers' devices by rank: names and bytes in all; and of the workers if they run.

    With `running` workers `config` has what a cluster was left to decide.
    """

    config: SessionConfig
    names: tuple[str, ...]
    total_bytes: tuple[int, ...]
    on_gpu: bool
    running: Session | None = None


def advise(model: RayModel, width: int, height: int, frames: int) -> str:
    """Say in lines how to run a model at a size on these workers. Starts none, and reads no weights.

    Raises ValueError: for a file that is no diffusion model that ComfyUI knows, or one that makes no pictures.
    """
    base = weightless.build(model.recipe.without_loras, forward_on_workers)
    size, cards = measure(base, width, height, frames), _cards(model)
    config = cards.config
    arrangement = Arrangement(config.mesh, config.by_run)
    if cards.running is not None:
        arrangement = cards.running.arrangement_by(config)
    lines = [
        _model(model.recipe, size, f"{width}x{height}" + (f", {frames} frames" if len(size.latent) == 5 else "")),
        f"{config.world_size}{' or more' if config.grows else ''} workers: {how(config)}; {_names(cards)}",
        *([] if cards.running is None else unlike_workers.describe(cards.running.places, arrangement)),
        "",
        "What fits, beside about 1.5 GB for CUDA and NCCL:" if cards.on_gpu else "What fits:",
        *_fits(model.recipe, size, arrangement.mesh, cards),
        "",
        "Degrees and expected speed:",
        *_speeds(size, model, arrangement, cards),
        "",
        *_measured(model.recipe),
    ]
    return "\n".join(lines)


def _cards(model: RayModel) -> _Cards:
    config, running = model.workers.config, active_session.running()
    if running is not None and running.config.can_become(decided := config.as_in(running.config)):
        memory = ask_all(running, WorkerService.memory)
        names = tuple(place.device for place in running.places.values())
        on_gpu = decided.device_type == "cuda"
        # A CPU's memory is that of all workers on its machine.
        on_machine = Counter(place.node for place in running.places.values())
        totals = tuple(
            memory[rank].total_bytes // (1 if on_gpu else on_machine[place.node])
            for rank, place in running.places.items()
        )
        return _Cards(decided, names, totals, on_gpu, running)
    if not config.is_local:
        return _Cards(config, (), (), config.device_type != "cpu")
    if config.device_type != "cuda":
        each = total_memory() // config.world_size
        return _Cards(config, ("cpu",) * config.world_size, (each,) * config.world_size, False)
    indices = config.gpu_select or tuple(range(min(config.world_size, torch.cuda.device_count())))
    found = [torch.cuda.get_device_properties(index) for index in indices]
    return _Cards(config, tuple(one.name for one in found), tuple(one.total_memory for one in found), True)


def _model(recipe: ModelRecipe, size: ModelSize, at: str) -> str:
    text = f"{recipe.name}: {size.name}, {gb(recipe.size)} of weights"
    if size.work is None:
        return f"{text}; {size.why_not}"
    return f"{text}, {size.work.heads} attention heads; at {at} {size.work.tokens} tokens"


def _names(cards: _Cards) -> str:
    if not cards.names:
        return "start them once to see what memory they have"
    each = [f"{name} {gb(total)}" for name, total in zip(cards.names, cards.total_bytes, strict=True)]
    return f"{len(each)} x {each[0]}" if len(set(each)) == 1 else ", ".join(each)


def _memory(cards: _Cards, workers: int) -> Weights:
    """Return the memory by which weights would be held, () where it is alike or not known."""
    if cards.running is not None:
        return memory_check.memory_of(cards.running.places)
    return memory_check.unlike(cards.total_bytes) if cards.on_gpu and len(cards.total_bytes) == workers else ()


def _fits(recipe: ModelRecipe, size: ModelSize, mesh: MeshShape, cards: _Cards) -> list[str]:
    """Return a line for each way to keep the weights, the fastest first, and which to choose: the first that fits."""
    workers = mesh.world_size
    compute = size.compute_bytes // (1 if size.work is None else mesh.ring * mesh.ulysses)
    gathered = min(recipe.size, _GATHERED * recipe.size // size.blocks)
    held_by_rank = held_by_each(recipe.size, workers, _memory(cards, workers))
    ways = {
        "FSDP off": [recipe.size] * workers,
        "FSDP": [held + gathered for held in held_by_rank],
        "FSDP and FSDP_CPU_OFFLOAD": [gathered] * workers,
    }
    lines, chosen = [], ""
    for way, weights in ways.items() if workers > 1 else list(ways.items())[:1]:
        lacking = [rank for rank, total in enumerate(cards.total_bytes) if weights[rank] + compute > total - _AROUND]
        verdict = "fits" if not lacking else f"does not fit on rank {', '.join(map(str, lacking))}"
        if not cards.total_bytes:
            verdict = "the workers' memory is not known yet"
        elif not lacking and not chosen:
            chosen = way
        of_weights = gb(weights[0]) if len(set(weights)) == 1 else ", ".join(map(gb, weights))
        lines.append(f"    {way}: {of_weights} of weights and about {gb(compute)} to compute on each: {verdict}")
    if cards.total_bytes:
        lines.append(f"Choose {chosen}." if chosen else "None fits: choose a smaller size, or a file with fp8 or GGUF.")
    return lines


def _speeds(size: ModelSize, model: RayModel, arrangement: Arrangement, cards: _Cards) -> list[str]:
    """Return a line for each kind of forward: the degrees, and what is expected of them."""
    hardware = _hardware(cards)
    sent_bytes = SENT_BYTES_IN_8_BITS if model.workers.strategy == OURS_INT8 else SENT_BYTES
    lines = []
    for rows, what in _FORWARDS:
        shape, words = arrangement.mesh, how(cards.config)
        if arrangement.by_run:
            choice = _choice(rows, size, arrangement, model.workers)
            shape, words = choice.shape, str(choice)
        lines.append(f"    {what}: {words}: {_expected(size, rows, shape, arrangement, hardware, sent_bytes)}")
    if hardware is None:
        lines.append("Seconds are told when the workers run on GPUs, and their links and speeds were tried.")
    elif model.workers.attention != kernels.AUTO:
        lines.append(f"Seconds are those of attention auto; {model.workers.attention} was not tried.")
    return lines


def _choice(rows: int, size: ModelSize, arrangement: Arrangement, workers: WorkerConfig) -> Choice:
    may_ring = kernels.has_lse(workers.attention) and is_ours(workers.strategy)
    rows = rows if size.independent_rows else 1
    return choose(rows, arrangement, Limits(None if size.work is None else size.work.heads, may_ring))


def _expected(
    size: ModelSize, rows: int, shape: MeshShape, arrangement: Arrangement, hardware: Hardware | None, sent_bytes: float
) -> str:
    if size.work is None:
        return "the model's tokens cannot be split"
    if hardware is None:
        times = speed_up(shape, rows, arrangement, Limits(size.work.heads))
        return f"about {times:.1f} times as fast as the fastest worker alone, as far as is known from other machines"
    seconds = forward_s(size.work, rows, shape, hardware, arrangement.speeds, sent_bytes)
    each = [forward_s(size.work, rows, MeshShape(), hardware.alone(rank)) for rank in range(shape.world_size)]
    alone_s, best = min((alone_s, rank) for rank, alone_s in enumerate(each))
    text = f"about {seconds:.3g} s a forward, {alone_s / seconds:.2f} times as fast as rank {best} alone"
    if seconds > alone_s:
        text += ", which is faster: the link is too slow for this size, or the other workers are. Choose GPU = 1"
    return text


def _hardware(cards: _Cards) -> Hardware | None:
    """Return what was tried of these workers, None if nothing was."""
    if cards.running is None:
        return None
    trial, links = speed_check.known(cards.running.places), cards.running.links
    if trial is None or not trial.is_complete or 0 in trial.memory or links is None or not links.bytes_per_s:
        return None
    return Hardware(trial.products, trial.attention, min(links.bytes_per_s.values()), links.latency_s, trial.memory)


def _measured(recipe: ModelRecipe) -> list[str]:
    runs: Sequence[step_times.RunTime] = step_times.last_runs(recipe.path)[:_SHOWN]
    if not runs:
        return ["No run of this file was measured since ComfyUI started."]
    lines = ["Measured in the last runs of this file, a step with all its forwards:"]
    for run in runs:
        size = "x".join(map(str, run.latent_shape))
        several = f", {run.runs} at once" if run.runs > 1 else ""
        on = f"{run.workers} workers ({run.how}, weights {run.sharding})"
        lines.append(f"    {run.seconds:.3g} s a step: latent {size}{several}, {run.steps} steps, {on}")
    return lines
