"""A patch that computes with a network of its own, in a module that no worker can import."""

import torch
from comfy.model_patcher import ModelPatcher


class Scaled:
    """A patch as model patches of ComfyUI's are: an object with a network of its own."""

    def __init__(self, width):
        torch.manual_seed(4)
        network = torch.nn.Linear(width, width)
        self.patcher = ModelPatcher(network.requires_grad_(False), torch.device("cpu"), torch.device("cpu"))

    def models(self):
        return [self.patcher]

    def to(self, _):
        return self

    def __call__(self, args):
        return {**args, "img": args["img"] + self.patcher.model(args["img"])}
