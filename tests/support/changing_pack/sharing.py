"""Changes whose code inside the model depends on what code around it, or the process, has."""

import torch


def _scaled(m, scale):
    """Scale what the first block adds, by a number that is asked for at each call."""

    def around(args, extra):
        out = extra["original_block"](args)
        return {"img": args["img"] + scale() * (out["img"] - args["img"])}

    m.set_model_patch_replace(around, "dit", "double_block", 0)


def SharedCounter(m):
    """Code around the model counts, code inside reads."""
    calls = 0

    def after(args):
        nonlocal calls
        calls += 1
        return args["denoised"]

    m.set_model_sampler_post_cfg_function(after)
    _scaled(m, lambda: 1 + 0.3 * calls)


def SharedResult(m):
    """Code inside the model keeps what code around it reads."""
    kept = []

    def around(args, extra):
        out = extra["original_block"](args)
        kept.append(out["img"].std().item())
        return out

    m.set_model_patch_replace(around, "dit", "double_block", 0)
    m.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * (1 + 0.2 * sum(kept)))


def NoiseInside(m):
    _scaled(m, lambda: 1 + 0.3 * torch.randn(1).item())
    m.set_model_sampler_post_cfg_function(lambda args: args["denoised"] + 0.1 * torch.randn(1).item())


def TorchSetting(m):
    matmul = torch.backends.cuda.matmul

    def wrapper(apply, kwargs):
        matmul.allow_fp16_accumulation = True
        try:
            return apply(kwargs["input"], kwargs["timestep"], **kwargs["c"])
        finally:
            matmul.allow_fp16_accumulation = False

    m.set_model_unet_function_wrapper(wrapper)
    _scaled(m, lambda: 2.0 if torch.backends.cuda.matmul.allow_fp16_accumulation else 1.0)


SHARING = (SharedCounter, SharedResult, NoiseInside, TorchSetting)
