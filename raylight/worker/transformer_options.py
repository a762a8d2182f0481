"""ComfyUI's `optimized_attention_override`, pointed at split attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from raylight.host.patcher_state import OVERRIDE
from raylight.parallel.full_tokens import FullTokens
from raylight.parallel.plan import Aligned, SequencePlan
from raylight.parallel.sequence_attention import Kernel, SequenceAttention


def install_override(model_options: dict[str, Any], attention: SequenceAttention, kernel: Kernel) -> None:
    """Route every attention call of a model through `attention`, in `model_options` of a patcher.

    An override that is there already stays, as the kernel of each rank: it gets all tokens, of some of the heads.
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
        """q (B, S, H * D), or (B, H, S, D) with `skip_reshape`; returns (B, S, H * D) or (B, H, S, D) likewise."""
        if not skip_reshape:
            width = q.shape[-1] // heads
            # SD3 hands v over with its heads apart already.
            q, k, v = (t.reshape(*t.shape[:2], -1, width).transpose(1, 2) for t in (q, k, v))
        scale = rest.get("scale")

        def chained(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, _: float | None) -> Tensor:
            return present(
                func,
                q,
                k,
                v,
                q.shape[1],
                mask=mask,
                attn_precision=attn_precision,
                skip_reshape=True,
                skip_output_reshape=True,
                **rest,
            )

        chained.in_order = True  # it may look for tokens by their place
        out = attention(kernel if present is None else chained, q, k, v, mask, scale)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    options[OVERRIDE] = override


Patch = Callable[..., Any]
Rules = Mapping[str, Aligned]

# Names of the arguments that ComfyUI passes by position; every other comes in a dict or by its name.
_POSITIONAL = {
    "attn1_patch": ("q", "k", "v"),
    "attn2_patch": ("q", "k", "v"),
    "attn1_output_patch": ("out",),
    "attn2_output_patch": ("out",),
}
_OPTIONS = ("transformer_options", "extra_options")


def install_patches(model: nn.Module, plan: SequencePlan, whole: FullTokens) -> RemovableHandle:
    """From now on the model's forward sees its patches wrapped; those in the caller's options stay as they are."""

    def wrap_all(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        options = kwargs.get("transformer_options") or {}
        whole.expect(kind for kind, patches in options.get("patches", {}).items() if patches)
        if options.get("patches") or options.get("patches_replace", {}).get("dit"):
            kwargs["transformer_options"] = _wrapped(options, plan, whole)
        return args, kwargs

    return model.register_forward_pre_hook(wrap_all, with_kwargs=True)


def _wrapped(options: Mapping[str, Any], plan: SequencePlan, whole: FullTokens) -> dict[str, Any]:
    result = dict(options)
    if "patches" in options:
        result["patches"] = {
            kind: [wrap(kind, patch, plan, whole) for patch in patches] for kind, patches in options["patches"].items()
        }
    if "dit" in options.get("patches_replace", {}):
        replaced = {
            key: wrap(key[0], patch, plan, whole, replaces=True)
            for key, patch in options["patches_replace"]["dit"].items()
        }
        result["patches_replace"] = {**options["patches_replace"], "dit": replaced}
    return result


def wrap(kind: str, patch: Patch, plan: SequencePlan, whole: FullTokens, replaces: bool = False) -> Patch:
    """A patch of that kind as a split model may call it; one that `replaces` a block is given the block to call.

    The call raises ValueError where tokens are split, or would be by the block, and the plan does not know `kind`.
    """
    rules = plan.patches.get(kind)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if rules is None:
            if whole.is_split or (replaces and whole.is_shared):
                raise ValueError(
                    f"{plan.model.rpartition('.')[2]} is split over workers, and there a '{kind}' patch is not "
                    f"supported: remove the node that patches the model this way, or use GPU = 1"
                )
            return patch(*args, **kwargs)
        named = dict(zip(_POSITIONAL.get(kind, ()), args, strict=False)) if isinstance(args[0], Tensor) else {}
        joined = [
            *(_join(value, name, rules, whole) for name, value in named.items()),
            *(_join(value, "", rules, whole) for value in args[len(named) :]),
        ]
        with whole.local_attention(replaces=replaces):
            output = patch(*joined, **{name: _join(value, name, rules, whole) for name, value in kwargs.items()})
        return _each(output, rules, whole.cut)

    return wrapped


def _join(value: Any, name: str, rules: Rules, whole: FullTokens) -> Any:
    """One argument with its tokens whole."""
    if isinstance(value, Tensor):
        return whole.join(value, rules[name]) if name in rules else value
    if not isinstance(value, Mapping):
        return value
    result = _each(value, rules, whole.join)
    if "original_block" in value:
        block = value["original_block"]
        result["original_block"] = lambda args: _each(block(_each(args, rules, whole.cut)), rules, whole.join)
    for key in _OPTIONS:
        if key in value:
            result[key] = _with_whole_slice(value[key], rules, whole)
    return _with_whole_slice(result, rules, whole)


def _each(value: Any, rules: Rules, convert: Callable[[Tensor, Aligned], Tensor]) -> Any:
    """What a patch or block was given or returns: named tensors, or one tensor, which is of the first rule."""
    if isinstance(value, Tensor):
        return convert(value, next(iter(rules.values())))
    if not isinstance(value, Mapping):
        return value
    return {
        name: convert(item, rules[name]) if name in rules and isinstance(item, Tensor) else item
        for name, item in value.items()
    }


def _with_whole_slice(options: Any, rules: Rules, whole: FullTokens) -> Any:
    """`img_slice` is the image's place in the joint tokens, which the model measured on this rank."""
    joint = next((rule.streams for rule in rules.values() if len(rule.streams) > 1), None)
    if joint is None or not isinstance(options, Mapping) or "img_slice" not in options or not whole.is_split:
        return options
    return {**options, "img_slice": [whole.total(joint[:-1]), whole.total(joint)]}
