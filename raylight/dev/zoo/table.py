"""`docs/models.md` from the results of the parity matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from raylight.plans import plan_for
from raylight.plans.exceptions import EXCEPTIONS

from . import families
from .day_one.section import section

HEAD = """# Models

Written by `make models` from the parity matrix (`tests/zoo/test_matrix.py`), never by hand. Each family is built at
tiny width with random weights from its ComfyUI configuration and called in each of the situations named: whole in one
process, and split by sequence over ranks, at sizes that do not divide. In float32, the largest difference is at most
{tolerance:.0e} of the output's standard deviation, on each of these meshes: {meshes}.
Each is also called with a text of one token, which is fewer than ranks, on 2 and 4 ranks by Ulysses and by ring
(`tests/zoo/test_one_token.py`).

| Family | Model class | Situations |
|---|---|---|
"""

EXCEPTIONS_HEAD = """
## Not split by sequence

| `comfy.supported_models` | Why |
|---|---|
"""


def render(
    passed: Mapping[str, Iterable[str]],
    meshes: Iterable[str],
    tolerance: float,
    without_plan: Mapping[tuple[str, str], str],
) -> str:
    """Return the document. `passed` has, per family, the situations that are equal on all `meshes`; `without_plan` how
    each situation is computed when the plan is taken away.
    """
    rows = []
    for name, calls in passed.items():
        model = plan_for(families()[name].outline().diffusion_model).model
        since = families()[name].since
        note = f" (from ComfyUI {since.rpartition('.')[0]} on)" if since else ""
        rows.append(f"| {name}{note} | `{model.rpartition('.')[2]}` | {'; '.join(calls)} |")
    exceptions = [f"| {name} | {reason} |" for name, reason in sorted(EXCEPTIONS.items())]
    head = HEAD.format(meshes="; ".join(meshes), tolerance=tolerance)
    return head + "\n".join(rows) + "\n" + section(without_plan) + EXCEPTIONS_HEAD + "\n".join(exceptions) + "\n"
