"""The section of docs/models.md on models without a plan."""

from __future__ import annotations

from collections.abc import Mapping

from .measure import BY_ROWS, PATCHED, SPLIT, WHOLE, WRONG

HEAD = """
## Without a plan

Each family with its plan taken away, on 2 workers by Ulysses (`python -m raylight.dev.zoo.day_one`). Its first forward
is computed whole, a plan is drafted from it and proven ([adding-a-model.md](adding-a-model.md)). {families} of {of}
families are split by a drafted plan in their first situation. Of all {situations} situations, {split} are split by
tokens, {rows} by batch rows, {whole} are computed whole by every worker, {patched} are too because nodes patch the
model, and {wrong} have a wrong output. Besides those with patches, these are not split by tokens:

| Family | Situation | Computed |
|---|---|---|
"""


def section(found: Mapping[tuple[str, str], str]) -> str:
    """Return the section. `found` has the outcome by family and situation, in order."""
    first = {family: outcome for (family, _), outcome in reversed(list(found.items()))}
    count = {kind: sum(outcome == kind for outcome in found.values()) for kind in set(found.values())}
    head = HEAD.format(
        families=sum(outcome == SPLIT for outcome in first.values()),
        of=len(first),
        situations=len(found),
        split=count.get(SPLIT, 0),
        rows=count.get(BY_ROWS, 0),
        whole=count.get(WHOLE, 0),
        patched=count.get(PATCHED, 0),
        wrong=count.get(WRONG, 0),
    )
    rows = [
        f"| {family} | {situation} | {outcome} |"
        for (family, situation), outcome in found.items()
        if outcome not in (SPLIT, PATCHED)
    ]
    return head + "\n".join(rows) + "\n"
