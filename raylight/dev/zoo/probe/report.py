"""The report of a probe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from raylight.plans.draft.draft import Undrafted, drafts
from raylight.plans.draft.record import Record, block_lists
from raylight.plans.draft.text import to_python

from .draft import Block, attention, describe
from .forward import record
from .subject import SIZES, subject


def report(name: str, given: Sequence[str], device: str) -> str:
    """Report which block inputs depend on image and text, with a draft of the plan.

    Raises ValueError: the model cannot be called with these inputs.
    """
    looked_at = subject(name, given, device)
    model = looked_at.model.diffusion_model
    records: dict[str, Record] = {}
    for size in SIZES:
        try:
            records[size] = record(looked_at.model, dict(looked_at.inputs[size]))
        except Exception as error:  # whatever the model raises for wrong inputs
            inputs = looked_at.inputs[size]
            shapes = {key: tuple(value.shape) for key, value in inputs.items() if hasattr(value, "shape")}
            raise ValueError(
                f"{type(model).__name__} could not be called with {shapes} on {device}: {type(error).__name__}: "
                f"{error}. Give what it needs with --input, or try --device cpu"
            ) from error
    known: dict[str, tuple[int, ...]] = {}
    blocks = [
        block for pattern, paths in block_lists(model).items() if (block := describe(pattern, paths[0], records, known))
    ]
    if not any(block.streams for block in blocks):
        raise ValueError(f"{type(model).__name__} has no list of blocks with a token stream in and out")
    return "\n".join(
        [*_table(blocks, records), "", *_draft(type(model), blocks, records), "", *_by_workers(model, records)]
    )


def _by_workers(model: nn.Module, records: dict[str, Record]) -> list[str]:
    """Return the first of the plans that workers would try by themselves."""
    kind = type(model)
    try:
        plan = drafts(f"{kind.__module__}.{kind.__qualname__}", records[SIZES[0]])[0]
    except Undrafted as error:
        return [f"# By what this shows, workers draft no plan by themselves: {error}"]
    return ["# What workers try first by themselves, which splits each list of blocks on its own:", to_python(plan)]


def _table(blocks: Sequence[Block], records: dict[str, Record]) -> list[str]:
    lines = []
    for block in blocks:
        calls = [records[size].calls[block.path] for size in SIZES]
        lines.append(f"{block.pattern}")
        for key in calls[0].inputs:
            shapes = [str(call.inputs.get(key, "-")) for call in calls]
            same = len(set(shapes)) == 1
            rule = block.lines.get(key) or block.lines.get(key.partition("[")[0])
            rule = "full" if same else rule or "see below"
            lines.append(f"    {key:<26} {rule:<34} {shapes[0] if same else ' -> '.join(shapes)}")
        lines.extend(f"    note: {note}" for note in block.notes)
        lines.extend(f"    attends in {path}: {what}" for path, what in attention(block, records).items())
        if block.streams and not attention(block, records):
            lines.append("    attends nowhere that ComfyUI's hook sees: name its Python module in `unhooked`")
    return lines


def _draft(model: type, blocks: Sequence[Block], records: dict[str, Record]) -> list[str]:
    lines = [
        "# A draft. Look for code between the blocks that takes tokens by their place, and gather before it; and put",
        "# streams in the order in which the model joins them.",
        "SequencePlan(",
        f'    model="{model.__module__}.{model.__qualname__}",',
        "    inputs={",
    ]
    streamed = [block for block in blocks if block.streams]
    for block in streamed:
        if block.lines:
            lines.append(f'        "{block.pattern}": {{')
            lines += [f'            "{key}": {rule},' for key, rule in block.lines.items()]
            lines.append("        },")
    lines += ["    },", "    attention={"]
    for block in streamed:
        for path, what in attention(block, records).items():
            lines.append(f'        "{path}": {what.partition(" ")[0]}({_tuple(block.streams)}),')
    last = streamed[-1]
    lines += ["    },", f'    outputs={{"{last.pattern.replace("*", "-1")}": {_gather(last)}}},', ")"]
    return lines


def _gather(block: Block) -> str:
    """Return where the image, or the only stream, leaves the blocks."""
    stream = "img" if "img" in block.streams else next(iter(block.streams))
    dim, place = block.streams[stream]
    more = "" if dim == 1 else f", dim={dim}"
    if place:
        more += f", index={place.strip('[]')}"
    before = [name for name, where in block.streams.items() if name != stream and where == (dim, place)]
    return f'Gather("{stream}"{more}{f", after={_tuple(before)}" if before else ""})'


def _tuple(names: Iterable[str]) -> str:
    quoted = [f'"{name}"' for name in names]
    return f"({', '.join(quoted)}{',' if len(quoted) == 1 else ''})"
