"""Deprecated nodes that are in saved workflows only: each is made from the node of ComfyUI that does its work."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from comfy_api.latest import io

import nodes as comfy_nodes  # ComfyUI's module: this package goes by the name of its folder

from .common import CATEGORY, driver, model_input

logger = logging.getLogger(__name__)

# The link types of these nodes, in the place of ComfyUI's. A RAY_ACTORS is a MODEL, and so with the others.
LINK_TYPES = {"MODEL": "RAY_ACTORS", "GUIDER": "RAY_GUIDER", "CONTROL_NET": "RAY_CONTROL_NET", "VAE": "RAY_VAE"}
MODEL = "ray_actors"


@dataclass(frozen=True, slots=True)
class Twin:
    """A node of saved workflows, and the id of ComfyUI's node that it calls.

    `names` are other names for inputs of that node. With `takes_model` there is an input for a model, which is not
    used, where ComfyUI's node has none. With `on_workers` its VAE runs on the workers that run when it is used.
    """

    node_id: str
    stock: str
    display_name: str
    names: Mapping[str, str] = field(default_factory=dict)
    takes_model: bool = False
    on_workers: bool = False

    @property
    def advice(self) -> str:
        """What to use in new workflows."""
        if self.on_workers:
            return "In new ones use Load VAE (Ray), which can also say which workers."
        return f"In new ones use ComfyUI's {title(self.stock)}" + (
            ", with a MODEL from Load Diffusion Model as MODEL (Ray): it does the same there."
            if any(kind == "MODEL" for _, kind, *_ in declared(self.stock))
            else ", which does the same in the same process."
        )

    def name_of(self, name: str, kind: Any) -> str:
        """Return the name, here, of an input or output of ComfyUI's node."""
        return MODEL if kind == "MODEL" else self.names.get(name, name)


TWINS = (
    Twin("RayModelSamplingSD3", "ModelSamplingSD3", "ModelSamplingSD3 (Ray)"),
    Twin("RayModelSamplingAuraFlow", "ModelSamplingAuraFlow", "ModelSamplingAuraFlow (Ray)"),
    Twin("RayModelSamplingFlux", "ModelSamplingFlux", "ModelSamplingFlux (Ray)"),
    Twin("RayBasicScheduler", "BasicScheduler", "BasicScheduler (Ray)"),
    Twin("RayBetaSamplingScheduler", "BetaSamplingScheduler", "BetaSamplingScheduler (Ray)"),
    Twin("RayBasicGuider", "BasicGuider", "BasicGuider (Ray)"),
    Twin("RayCFGGuider", "CFGGuider", "CFGGuider (Ray)"),
    Twin("RayDualCFGGuider", "DualCFGGuider", "DualCFGGuider (Ray)"),
    Twin("RayTorchCompileModel", "TorchCompileModel", "TorchCompileModel (Ray)"),
    Twin("RayControlNetLoader", "ControlNetLoader", "Load ControlNet Model (Ray)", takes_model=True),
    Twin("RayControlNetApply", "ControlNetApplyAdvanced", "Apply ControlNet (Ray)", {"control_net": "reference"}),
    Twin("RayVAELoader", "VAELoader", "Load VAE as RAY_VAE (Ray)", on_workers=True),
)


def title(stock: str) -> str:
    """Return the name of a node of ComfyUI in its menu."""
    return comfy_nodes.NODE_DISPLAY_NAME_MAPPINGS.get(stock) or stock


def declared(stock: str) -> Iterator[tuple[str, Any, dict[str, Any], bool]]:
    """Yield name, type (a list for V1's combo), options and whether it is optional, of each input of a node of ComfyUI.

    V3's nodes declare V1's dictionaries, too.
    """
    groups = comfy_nodes.NODE_CLASS_MAPPINGS[stock].INPUT_TYPES()
    for group in ("required", "optional"):
        for name, (kind, *options) in groups.get(group, {}).items():
            yield name, kind, dict(*options), group == "optional"


def inputs_like(stock: str, rename: Callable[[str, Any], str] = lambda name, kind: name) -> list[io.Input]:
    """Return the inputs of a node of ComfyUI in their order, with its options and the link types of this pack."""
    return [
        _input(rename(name, kind), kind, options, optional, stock) for name, kind, options, optional in declared(stock)
    ]


def _input(name: str, kind: Any, options: dict[str, Any], optional: bool, stock: str) -> io.Input:
    if kind == "MODEL":
        return model_input()
    if isinstance(kind, list):
        kind, options = "COMBO", options | {"options": kind}
    tooltip = options.pop("tooltip", None) or f"As in ComfyUI's {title(stock)}."
    # A type by its name is enough: the options are handed on as they are.
    return io.Custom(LINK_TYPES.get(kind, kind)).Input(name, optional=optional, tooltip=tooltip, extra_dict=options)


def outputs_like(stock: str) -> list[io.Output]:
    """Return the outputs of a node of ComfyUI with the link types of this pack."""
    node = comfy_nodes.NODE_CLASS_MAPPINGS[stock]
    kinds = list(node.RETURN_TYPES)
    names = getattr(node, "RETURN_NAMES", None) or kinds
    return [
        io.Custom(LINK_TYPES.get(kind, kind)).Output(
            display_name=MODEL if kind == "MODEL" else name, tooltip=f"As from ComfyUI's {title(stock)}."
        )
        for kind, name in zip(kinds, names, strict=True)
    ]


def call(stock: str, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Run a node of ComfyUI and return its outputs."""
    node = comfy_nodes.NODE_CLASS_MAPPINGS[stock]
    if issubclass(node, io.ComfyNode):
        return tuple(node.execute(**inputs).result or ())
    return tuple(getattr(node(), node.FUNCTION)(**inputs))


class _Derived(io.ComfyNode):
    twin: ClassVar[Twin]

    @classmethod
    def define_schema(cls) -> io.Schema:
        twin = cls.twin
        return io.Schema(
            node_id=twin.node_id,
            display_name=twin.display_name,
            category=CATEGORY,
            description=f"For saved workflows. {twin.advice}",
            search_aliases=[title(twin.stock)],
            inputs=[*([model_input()] if twin.takes_model else []), *inputs_like(twin.stock, twin.name_of)],
            outputs=outputs_like(twin.stock),
            is_deprecated=True,
        )

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        twin = cls.twin
        names = {twin.name_of(name, kind): name for name, kind, *_ in declared(twin.stock)}
        outputs = call(twin.stock, {names[name]: inputs[name] for name in names if name in inputs})
        return io.NodeOutput(*(driver().parallelize_vae(one, None) if twin.on_workers else one for one in outputs))


def derived_nodes() -> list[type[io.ComfyNode]]:
    """Return a node for each twin whose original this ComfyUI has."""
    there = [twin for twin in TWINS if twin.stock in comfy_nodes.NODE_CLASS_MAPPINGS]
    missing = [twin.node_id for twin in TWINS if twin not in there]
    if missing:
        logger.info("this ComfyUI lacks the nodes that these are made from: %s", ", ".join(missing))
    return [type(twin.node_id, (_Derived,), {"twin": twin, "__module__": __name__}) for twin in there]
