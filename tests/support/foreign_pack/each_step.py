"""Code of a node pack around a model that changes, in each step, what its code inside the model uses; and code inside
that a node changes from one run to the next.
"""

import torch


class Settings:
    strength = 0.5


class Kept:
    """A patch that a node makes once, and whose strength it sets when it runs. It counts its calls within a run."""

    strength = 0.0

    def __init__(self):
        self.calls = 0

    def __call__(self, args):
        self.calls += 1
        args["img"] = args["img"] * (1 + self.strength / self.calls)
        return args


KEPT = Kept()
GLOBAL = {"strength": 0.0}


def _with(model, around, inside):
    model = model.clone()
    model.set_model_unet_function_wrapper(around)
    if inside is not None:
        model.set_model_post_input_patch(inside)
    return model


def _options(args):
    options = args["c"]["transformer_options"] = dict(args["c"]["transformer_options"])
    return options


def _by_region(args):
    region = args["transformer_options"]["region"]
    args["img"] = args["img"] * (1 + region["settings"].strength * region["mask"].mean().to(args["img"]))
    return args


def other_objects(model):
    """A mask and settings made in each step."""

    def around(apply, args):
        mask = torch.full((3,), 0.9) * args["timestep"][0]
        _options(args)["region"] = {"mask": mask, "settings": Settings()}
        return apply(args["input"], args["timestep"], **args["c"])

    return _with(model, around, _by_region)


def same_tensor(model):
    """A mask that is filled anew in each step, beside settings."""
    region = {"mask": torch.zeros(3), "settings": Settings()}

    def around(apply, args):
        region["mask"].fill_(0.9 * args["timestep"][0].item())
        _options(args)["region"] = region
        return apply(args["input"], args["timestep"], **args["c"])

    return _with(model, around, _by_region)


def same_object(model):
    """Settings of which an attribute is set in each step, beside a patch that counts its calls."""
    settings, counted = Settings(), Kept()

    def around(apply, args):
        settings.strength = 0.9 * args["timestep"][0].item()
        _options(args)["settings"] = settings
        return apply(args["input"], args["timestep"], **args["c"])

    def inside(args):
        counted.strength = args["transformer_options"]["settings"].strength
        return counted(args)

    return _with(model, around, inside)


def attribute(model):
    """A tensor that is set on the model in each step."""

    def around(apply, args):
        apply.__self__.diffusion_model.my_mask = torch.full((3,), 0.9) * args["timestep"][0]
        return apply(args["input"], args["timestep"], **args["c"])

    return _with(model, around, None)


def kept_patch(model, strength):
    """A patch that stays the same object from run to run."""
    KEPT.strength, KEPT.calls = strength, 0
    model = model.clone()
    model.set_model_post_input_patch(KEPT)
    return model


def by_global(model, strength):
    """A patch that reads a global."""
    GLOBAL["strength"] = strength
    model = model.clone()
    model.set_model_post_input_patch(_scaled_by_global)
    return model


def _scaled_by_global(args):
    args["img"] = args["img"] * (1 + GLOBAL["strength"])
    return args
