"""ComfyUI's `optimized_attention_override`, pointed at split attention, and node patches that get full tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from raylight.host.patcher_state import OVERRIDE
from raylight.parallel import full_tokens
from raylight.parallel.plan import Aligned, SequencePlan
from raylight.parallel.sequence_attention import Kernel, SequenceAttention
from raylight.parallel.tokens import TokenState

OURS = "raylight_only"


def install_override(
    model_options: dict[str, Any], attention: SequenceAttention | Callable[..., Tensor], kernel: Kernel
) -> None:
    """Route every attention call of a model through `attention`, in `model_options` of a patcher.

    An override that is already there becomes each rank's kernel: it gets all tokens, of some of the heads.
    """
    options = model_options.setdefault("transformer_options", {})
    present = options.get(OVERRIDE)

    def override(
        func: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **rest: Any,
    ) -> Tensor:
        """Q (B, S, H * D), or (B, H, S, D) with `skip_reshape`; returns (B, S, H * D) or (B, H, S, D) likewise."""
        if not skip_reshape:
            width = q.shape[-1] // heads
            # SD3 passes v with separate heads already. (B, S, H * D) -> (B, H, S, D)
            q, k, v = (t.reshape(*t.shape[:2], -1, width).transpose(1, 2) for t in (q, k, v))

        def chained(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
            given = {"mask": mask, "attn_precision": attn_precision, **rest}
            return present(func, q, k, v, q.shape[1], skip_reshape=True, skip_output_reshape=True, **given)

        chained.in_order = True  # it may address tokens by their position
        chosen = kernel if present is None else chained
        if rest.get("low_precision_attention") is False:  # the model says that it suffers
            chosen = getattr(chosen, "precise", chosen)
        out = attention(chosen, q, k, v, mask, rest.get("scale"))
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    setattr(override, OURS, present is None)
    options[OVERRIDE] = override


def is_ours(override: Any) -> bool:
    """Return whether an override is of `install_override`, with no code of a node in it."""
    return bool(getattr(override, OURS, False))


Patch = Callable[..., Any]
Rules = Mapping[str, Aligned]

# Names of the arguments that ComfyUI passes by position; all others come in a dict or by name.
_POSITIONAL = {
    "attn1_patch": ("q", "k", "v"),
    "attn2_patch": ("q", "k", "v"),
    "attn1_output_patch": ("out",),
    "attn2_output_patch": ("out",),
}
_OPTIONS = ("transformer_options", "extra_options")


def install_patches(model: nn.Module, plan: SequencePlan, tokens: TokenState) -> RemovableHandle:
    """Wrap the patches that the model's forward sees until the handle is removed. The caller's options stay."""

    def wrap_all(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        options = kwargs.get("transformer_options")
        options = {} if options is None else options  # to ask whether it is empty would read all, for a graph
        tokens.patched = frozenset(kind for kind, patches in options.get("patches", {}).items() if patches)
        if options.get("patches") or options.get("patches_replace", {}).get("dit"):
            kwargs["transformer_options"] = _wrapped(options, plan, tokens)
        return args, kwargs

    return model.register_forward_pre_hook(wrap_all, with_kwargs=True)


def _wrapped(options: Mapping[str, Any], plan: SequencePlan, tokens: TokenState) -> dict[str, Any]:
    result = dict(options)
    if "patches" in options:
        result["patches"] = {
            kind: [wrap(kind, patch, plan, tokens) for patch in patches] for kind, patches in options["patches"].items()
        }
    if "dit" in options.get("patches_replace", {}):
        replaced = {
            key: wrap(key[0], patch, plan, tokens, replaces=True)
            for key, patch in options["patches_replace"]["dit"].items()
        }
        result["patches_replace"] = {**options["patches_replace"], "dit": replaced}
    return result


def wrap(kind: str, patch: Patch, plan: SequencePlan, tokens: TokenState, replaces: bool = False) -> Patch:
    """Return `patch`, of this kind, as a split model may call it: it gets full tokens, and its result is sharded.

    A patch that `replaces` a block also gets the block to call. The call raises ValueError when tokens are sharded, or
    the block would shard them, and the plan has no rules for `kind`.
    """
    rules = plan.patches.get(kind)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if rules is None:
            if tokens.is_split or (replaces and tokens.degree > 1):
                raise ValueError(
                    f"{plan.model.rpartition('.')[2]} is split over workers, and there a '{kind}' patch is not "
                    f"supported: remove the node that patches the model this way, or use GPU = 1"
                )
            return patch(*args, **kwargs)
        named = dict(zip(_POSITIONAL.get(kind, ()), args, strict=False)) if isinstance(args[0], Tensor) else {}
        positional = [("", value) for value in args[len(named) :]]
        full = [_gathered(value, name, rules, tokens) for name, value in (*named.items(), *positional)]
        with full_tokens.full_attention(tokens, replaces):
            output = patch(*full, **{name: _gathered(value, name, rules, tokens) for name, value in kwargs.items()})
        return _convert(output, rules, partial(full_tokens.shard, tokens))

    return wrapped


def _gathered(value: Any, name: str, rules: Rules, tokens: TokenState) -> Any:
    """One argument with full tokens."""
    gather, shard = partial(full_tokens.gather, tokens), partial(full_tokens.shard, tokens)
    if isinstance(value, Tensor):
        return gather(value, rules[name]) if name in rules else value
    if not isinstance(value, Mapping):
        return value
    result = _convert(value, rules, gather)
    if "original_block" in value:
        block = value["original_block"]
        result["original_block"] = lambda args: _convert(block(_convert(args, rules, shard)), rules, gather)
    for key in _OPTIONS:
        if key in value:
            result[key] = _with_full_slice(value[key], rules, tokens)
    return _with_full_slice(result, rules, tokens)


def _convert(value: Any, rules: Rules, convert: Callable[[Tensor, Aligned], Tensor]) -> Any:
    """Convert what a patch or block gets or returns: named tensors, or one tensor, to which the first rule applies."""
    if isinstance(value, Tensor):
        return convert(value, next(iter(rules.values())))
    if not isinstance(value, Mapping):
        return value
    return {
        name: convert(item, rules[name]) if name in rules and isinstance(item, Tensor) else item
        for name, item in value.items()
    }


def _with_full_slice(options: Any, rules: Rules, tokens: TokenState) -> Any:
    """Set `img_slice`, the image's range in the joint tokens, which the model measured on this rank's tokens."""
    joint = next((rule.streams for rule in rules.values() if len(rule.streams) > 1), None)
    if joint is None or not isinstance(options, Mapping) or "img_slice" not in options or not tokens.is_split:
        return options
    return {**options, "img_slice": [tokens.total(joint[:-1]), tokens.total(joint)]}
