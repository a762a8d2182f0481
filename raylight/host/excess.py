"""What a file has and its model has no place for: left-overs that ComfyUI warns of, or the sign of a wrong picture."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .telling import some

# Names that makers of quantised files give to what a weight of 8 bits is multiplied by, and to the marker of a format.
_SCALE = re.compile(r"^(.*?)[._]?(weight)?[._](weight_scale(_2|_inv)?|scale_weight|scale_inv|scales?|input_scale|"
                    r"scale_input|absmax|SCB|comfy_quant)$")


def check_size(found: Mapping[str, Tensor], unused: Collection[str], taken_for: str) -> None:
    """Raises ValueError where most elements of the tensors `found` in a file were not used for the model: then it is
    another model than it was taken for."""
    of_all = sum(math.prod(tensor.shape) for tensor in found.values())
    of_unused = sum(math.prod(found[name].shape) for name in unused)
    if 2 * of_unused > of_all:
        raise ValueError(f"most of it ({of_unused / of_all:.0%}, in {len(unused)} tensors: {some(unused)}) has no "
                         f"place in {taken_for}, which ComfyUI takes it for")


def check_scales(found: Mapping[str, Tensor], unused: Collection[str], loaded: Callable[[str], Tensor | None]) -> None:
    """Raises ValueError where 8-bit weights of those `found` in a file were loaded without their scales: a picture of
    such weights is noise. `loaded` tells what a weight of the file has become in the model."""
    lost = [name for name in unused if _is_lost_scale(found, name, loaded)]
    if lost:
        raise ValueError(f"it has weights of 8 bits with scales that ComfyUI does not know ({some(lost)}), and without "
                         f"them the picture is noise. Take a file that is made for ComfyUI, or one of 16 bits")


def parameter_of(model: nn.Module, name: str) -> Tensor | None:
    """A parameter by its name, None where there is none."""
    try:
        return model.get_parameter(name)
    except AttributeError:
        return None


def _is_lost_scale(found: Mapping[str, Tensor], name: str, loaded: Callable[[str], Tensor | None]) -> bool:
    match = _SCALE.match("." + name)
    if match is None:
        return False
    weight = f"{match[1]}.weight".lstrip(".")
    if weight not in found or found[weight].dtype.itemsize != 1:
        return False
    value = loaded(weight)
    # A weight that is made of tensors has the scales of its format.
    if value is None or is_traceable_wrapper_subclass(value.data):
        return False
    return name.endswith("comfy_quant") or not bool((found[name].float() == 1).all())
