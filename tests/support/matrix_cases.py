"""One family on ranks: ComfyUI's own `apply_model` against the split one, in the same process."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from comfy.cli_args import args

args.cpu = True  # before ComfyUI picks a device

from raylight.attention.kernels import kernel  # noqa: E402
from raylight.host import attention_hook, patch_hook  # noqa: E402
from raylight.parallel.attention import SequenceAttention  # noqa: E402
from raylight.parallel.hooks import SequenceHooks  # noqa: E402
from raylight.parallel.mesh import build_mesh  # noqa: E402
from raylight.parallel.shape import MeshShape  # noqa: E402
from raylight.parallel.tokens import TokenState  # noqa: E402
from raylight.parallel.ulysses import UlyssesAttention  # noqa: E402
from raylight.parallel.whole import WholeTokens  # noqa: E402
from raylight.plans import plan_for  # noqa: E402
from raylight.zoo import families  # noqa: E402
from raylight.zoo.family import Draw  # noqa: E402


@dataclass(frozen=True)
class Comparison:
    """What one rank measured in one call. `heads` are those of the exchanged attention calls on this rank, of `of`."""

    error: float
    std: float
    exchanged: int
    largest_share: float
    heads: int
    of: int
    failure: str = ""


def copied(value: Any) -> Any:
    if torch.is_tensor(value):
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def compare(rank: int, world: int, names: tuple[str, ...]) -> dict[tuple[str, str], Comparison]:
    """Every call of the named families on `world` Ulysses ranks."""
    group = build_mesh(MeshShape(ulysses=world), torch.device("cpu")).get_group("ulysses")
    results = {}
    for name in names:
        family = families()[name]
        for call, make in family.calls.items():
            try:
                with torch.inference_mode():
                    results[name, call] = _compare(family, make, rank, world, group)
            except Exception:  # told by the test of this call; a failure before any exchange harms no other call
                results[name, call] = Comparison(1.0, 0.0, 0, 1.0, 0, 0, traceback.format_exc())
    return results


def _compare(family: Any, make: Any, rank: int, world: int, group: Any) -> Comparison:
    model = family.build()
    inputs = make(Draw(3))
    options = inputs.pop("transformer_options", {})
    expected = model.apply_model(**copied(inputs), transformer_options=dict(options))
    if options:
        bare = model.apply_model(**copied(inputs), transformer_options={})
        assert (bare - expected).abs().max() > 0.1 * bare.std(), "the model does not call these patches"

    tokens = TokenState(rank, world)
    plan = plan_for(model.diffusion_model)
    hooks = SequenceHooks(model.diffusion_model, plan, tokens, group)
    patches = patch_hook.install(model.diffusion_model, plan, WholeTokens(tokens, group))
    heads: list[int] = []
    exchange = UlyssesAttention(group)

    def counted(inner, q, k, v, lengths, mask, scale):
        def seen(q, k, v, mask, scale):
            heads.append(q.shape[1])
            return inner(q, k, v, mask, scale)

        return exchange(seen, q, k, v, lengths, mask, scale)

    attention = SequenceAttention(tokens, counted, group)
    model_options = {"transformer_options": dict(options)}
    attention_hook.install(model_options, attention, kernel("TORCH"))
    actual = model.apply_model(**copied(inputs), transformer_options=model_options["transformer_options"])
    hooks.remove()
    patches.remove()
    return Comparison(
        ((actual - expected).abs().max() / expected.std()).item(), expected.std().item(),
        attention.counts.exchanged, attention.counts.largest_share, max(heads, default=0),
        attrgetter(plan.heads)(model.diffusion_model),
    )
