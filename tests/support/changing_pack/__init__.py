"""A node pack of somebody else, whose nodes change the inside of a Wan: by object patches, and on the model itself."""

import functools
from unittest.mock import patch

import comfy.ldm.wan.model
import comfy.patcher_extension
import comfy.samplers
import torch
from comfy.ldm.flux.math import apply_rope
from comfy.ldm.modules.attention import optimized_attention
from comfy.ldm.wan.model import WanModel, WanSelfAttention

from .sharing import SHARING

BLOCK = "diffusion_model.blocks.0"


def _bound(function, module):
    return function.__get__(module, type(module))


def _attention_without_options(self, x, freqs, **kwargs):
    b, s, n, d = *x.shape[:2], self.num_heads, self.head_dim
    q, k = self.norm_q(self.q(x)).view(b, s, n, d), self.norm_k(self.k(x)).view(b, s, n, d)
    q, k = apply_rope(q, k, freqs)
    return self.o(optimized_attention(q.reshape(b, s, n * d), k.reshape(b, s, n * d), self.v(x), heads=n))


def _attention_by_torch(self, x, freqs, **kwargs):
    b, s, n, d = *x.shape[:2], self.num_heads, self.head_dim
    q, k = self.norm_q(self.q(x)).view(b, s, n, d), self.norm_k(self.k(x)).view(b, s, n, d)
    q, k = apply_rope(q, k, freqs)
    q, k, v = (t.reshape(b, s, n, d).transpose(1, 2) for t in (q, k, self.v(x)))
    return self.o(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Dropping(WanSelfAttention):
    forward = _attention_without_options


def _all_tokens(self, x, freqs, **kwargs):
    return WanSelfAttention.forward(self, x, freqs, **kwargs) + x.mean(1, keepdim=True) * x.shape[1] ** 0.1


def AttentionForward(m):
    a = m.get_model_object(f"{BLOCK}.self_attn")
    m.add_object_patch(f"{BLOCK}.self_attn.forward", _bound(_attention_without_options, a))


def AttentionByTorch(m):
    a = m.get_model_object(f"{BLOCK}.self_attn")
    m.add_object_patch(f"{BLOCK}.self_attn.forward", _bound(_attention_by_torch, a))


def AttentionClass(m):
    m.add_object_patch(f"{BLOCK}.self_attn.__class__", _Dropping)


def AttentionMean(m):
    a = m.get_model_object(f"{BLOCK}.self_attn")
    m.add_object_patch(f"{BLOCK}.self_attn.forward", _bound(_all_tokens, a))


def MeanOnWhatIsThere(m):
    a = m.get_model_object(f"{BLOCK}.self_attn")
    old = type(a).forward

    def forward(self, x, freqs, **kwargs):
        return old(self, x, freqs, **kwargs) + x.mean(1, keepdim=True)

    m.add_object_patch(f"{BLOCK}.self_attn.forward", _bound(forward, a))


def CrossAttentionMean(m):
    a = m.get_model_object(f"{BLOCK}.cross_attn")
    old = type(a).forward

    def forward(self, x, context, **kwargs):
        return old(self, x, context, **kwargs) + x.mean(1, keepdim=True)

    m.add_object_patch(f"{BLOCK}.cross_attn.forward", _bound(forward, a))


def ChunkedFeedForward(m):
    ffn = m.get_model_object(f"{BLOCK}.ffn")
    old = ffn.forward

    def forward(x, *args):
        return torch.cat([old(one, *args) for one in x.chunk(3, 1)], 1) * -1

    m.add_object_patch(f"{BLOCK}.ffn.forward", forward)


def NormOverTokens(m):
    old = m.get_model_object(f"{BLOCK}.norm1").forward
    m.add_object_patch(f"{BLOCK}.norm1.forward", lambda x: old(x) - x.mean(1, keepdim=True))


def Embedding(m):
    old = m.get_model_object("diffusion_model.rope_embedder")

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.old = old

        def forward(self, ids):
            return self.old(ids * 0.5)

    m.add_object_patch("diffusion_model.rope_embedder", Scaled())


def RootForward(m):
    old = m.get_model_object("diffusion_model.forward")

    def forward(*args, **kwargs):
        return old(*args, **kwargs) * 1.2

    m.add_object_patch("diffusion_model.forward", forward)


def ForwardOrigInWrapper(m):
    dm = m.get_model_object("diffusion_model")
    old = type(dm).forward_orig

    def other(self, *args, **kwargs):
        return old(self, *args, **kwargs) * 1.5

    def wrapper(apply, kwargs):
        with patch.multiple(dm, forward_orig=_bound(other, dm)):
            return apply(kwargs["input"], kwargs["timestep"], **kwargs["c"])

    m.set_model_unet_function_wrapper(wrapper)


def ClassInWrapper(m):
    dm = m.get_model_object("diffusion_model")
    kind = type(dm.blocks[0])
    old = kind.forward

    @functools.wraps(old)
    def other(self, x, *args, **kwargs):
        return x + 1.5 * (old(self, x, *args, **kwargs) - x)

    def wrapper(apply, kwargs):
        with patch.object(kind, "forward", other):
            return apply(kwargs["input"], kwargs["timestep"], **kwargs["c"])

    m.set_model_unet_function_wrapper(wrapper)


def PartialInWrapper(m):
    module = comfy.ldm.wan.model
    old = module.sinusoidal_embedding_1d

    def other(factor, dim, position):
        return old(dim, position * factor)

    def wrapper(apply, kwargs):
        with patch.object(module, "sinusoidal_embedding_1d", functools.partial(other, 0.5)):
            return apply(kwargs["input"], kwargs["timestep"], **kwargs["c"])

    m.set_model_unet_function_wrapper(wrapper)


def StateOnModel(m):
    """Keeps on the model, as caching packs do, what the forward and the code around it know of a run."""
    dm = m.get_model_object("diffusion_model")
    old = type(dm).forward_orig

    def other(self, *args, **kwargs):
        self.their_calls = [*getattr(self, "their_calls", ()), 1]
        return old(self, *args, **kwargs) * (1 + 0.2 * len(self.their_calls))

    def wrapper(apply, kwargs):
        if len(getattr(dm, "their_calls", ())) > 2:
            del dm.their_calls
        with patch.multiple(dm, forward_orig=_bound(other, dm)):
            return apply(kwargs["input"], kwargs["timestep"], **kwargs["c"])

    m.set_model_unet_function_wrapper(wrapper)


def StateInClosure(m):
    dm = m.get_model_object("diffusion_model")
    old = type(dm).forward_orig
    calls = 0

    def other(self, *args, **kwargs):
        return old(self, *args, **kwargs) * (1 + 0.2 * calls)

    def wrapper(apply, kwargs):
        nonlocal calls
        calls += 1
        with patch.multiple(dm, forward_orig=_bound(other, dm)):
            return apply(kwargs["input"], kwargs["timestep"], **kwargs["c"])

    m.set_model_unet_function_wrapper(wrapper)


class _Root(WanModel):
    def forward_orig(self, *args, **kwargs):
        return super().forward_orig(*args, **kwargs) * 1.2


def InPlaceClasses(m):
    dm = m.model.diffusion_model
    dm.__class__ = _Root
    for block in dm.blocks:
        block.self_attn.__class__ = _Dropping


def InPlaceForwardOrig(m):
    dm = m.model.diffusion_model
    old = type(dm).forward_orig
    dm.forward_orig = _bound(lambda self, *args, **kwargs: old(self, *args, **kwargs) * 1.5, dm)


def InPlaceForward(m):
    dm = m.model.diffusion_model
    old = dm.forward
    dm.forward = lambda *args, **kwargs: old(*args, **kwargs) * 1.1


def InPlaceBlock(m):
    b = m.model.diffusion_model.blocks[0]
    old = type(b).forward
    b.forward = _bound(lambda self, x, *args, **kwargs: x + 2 * (old(self, x, *args, **kwargs) - x), b)


def InPlaceAttribute(m):
    for block in m.model.diffusion_model.blocks:
        for module in (block.self_attn.norm_q, block.self_attn.norm_k):
            module.eps = 0.5


def ForwardHook(m):
    m.model.diffusion_model.blocks[0].register_forward_hook(lambda module, args, out: out * 1.5)


def WeightInPlace(m):
    with torch.no_grad():
        m.model.diffusion_model.head.head.weight.mul_(1.5)


def WeightData(m):
    m.model.diffusion_model.head.head.weight.data.mul_(1.5)


def WeightReplaced(m):
    head = m.model.diffusion_model.head.head
    head.weight = torch.nn.Parameter(head.weight.detach() * 1.5, requires_grad=False)


def UsesWeights(m):
    dm = m.get_model_object("diffusion_model")
    with torch.no_grad():
        c = dm.text_embedding(torch.ones(1, 4, dm.text_embedding[0].weight.shape[1])).mean()
    m.model_options["transformer_options"]["optimized_attention_override"] = lambda f, *a, **k: f(*a, **k) + c


def OverrideByHead(m):
    def override(attention, q, k, v, heads, **kwargs):
        out = attention(q, k, v, heads, **kwargs).clone()
        if kwargs.get("skip_output_reshape"):
            out[:, 0] *= 1.5
        else:
            out[..., : out.shape[-1] // heads] *= 1.5
        return out

    m.model_options["transformer_options"]["optimized_attention_override"] = override


def OverrideByToken(m):
    def override(attention, q, k, v, heads, **kwargs):
        out = attention(q, k, v, heads, **kwargs).clone()
        (out[:, :, :7] if kwargs.get("skip_output_reshape") else out[:, :7]).mul_(1.5)
        return out

    m.model_options["transformer_options"]["optimized_attention_override"] = override


def Loop(m):
    """A pack that takes the place of a function of ComfyUI's sampling as long as this model's run goes on."""
    old = comfy.samplers.cfg_function

    def other(*args, **kwargs):
        return old(*args, **kwargs) * 0.9

    def around(executor, *args, **kwargs):
        with patch.object(comfy.samplers, "cfg_function", other):
            return executor(*args, **kwargs)

    m.add_wrapper(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, around)


def ReplacedInPlace(m):
    """Puts another module in the place of one."""
    blocks = m.model.diffusion_model.blocks
    blocks[0] = torch.nn.Identity()


def OtherOrderInWrapper(m):
    dm = m.model.diffusion_model
    blocks = torch.nn.ModuleList([*dm.blocks][::-1])

    def wrapper(apply, kwargs):
        with patch.object(dm, "blocks", blocks):
            return apply(kwargs["input"], kwargs["timestep"], **kwargs["c"])

    m.set_model_unet_function_wrapper(wrapper)


def Failing(m):
    """Raises inside of a step, on every worker alike."""

    def forward(x, *args):
        raise RuntimeError("this node has failed")

    m.add_object_patch("diffusion_model.blocks.1.ffn.forward", forward)


CHANGES = (
    AttentionForward,
    AttentionByTorch,
    AttentionClass,
    AttentionMean,
    MeanOnWhatIsThere,
    CrossAttentionMean,
    ChunkedFeedForward,
    NormOverTokens,
    Embedding,
    RootForward,
    ForwardOrigInWrapper,
    ClassInWrapper,
    PartialInWrapper,
    StateOnModel,
    StateInClosure,
    InPlaceClasses,
    InPlaceForwardOrig,
    InPlaceForward,
    InPlaceBlock,
    InPlaceAttribute,
    ForwardHook,
    WeightInPlace,
    WeightData,
    WeightReplaced,
    UsesWeights,
    OverrideByHead,
    OverrideByToken,
    Loop,
    *SHARING,
    ReplacedInPlace,
    OtherOrderInWrapper,
    Failing,
)


def _node(change):
    def go(self, model):
        model = model.clone()
        change(model)
        return (model,)

    types = classmethod(lambda s: {"required": {"model": ("MODEL",)}})
    return type(
        change.__name__,
        (),
        {"INPUT_TYPES": types, "RETURN_TYPES": ("MODEL",), "FUNCTION": "go", "CATEGORY": "changing", "go": go},
    )


NODE_CLASS_MAPPINGS = {"Changing" + change.__name__: _node(change) for change in CHANGES}
NODE_DISPLAY_NAME_MAPPINGS = {name: name.replace("Changing", "Changing: ") for name in NODE_CLASS_MAPPINGS}
