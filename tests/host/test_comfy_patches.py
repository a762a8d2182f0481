"""Attention calls that do not hand on ComfyUI's options get those of the forward being run."""

from __future__ import annotations

import ast
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention
import pytest
import torch

from raylight.host import comfy_patches

NAME = "a_model_of_comfyui"


class Model(torch.nn.Module):
    def __init__(self, module: types.ModuleType) -> None:
        super().__init__()
        self.module = module

    def forward(self, q: torch.Tensor, transformer_options: dict[str, Any]) -> torch.Tensor:
        return self.module.optimized_attention(q, q, q, 2)


@pytest.fixture
def module() -> Iterator[types.ModuleType]:
    module = sys.modules[NAME] = types.ModuleType(NAME)
    module.optimized_attention = comfy.ldm.modules.attention.attention_pytorch
    yield module
    del sys.modules[NAME]


def override(*_: Any, **__: Any) -> str:
    return "overridden"


OPTIONS = {"optimized_attention_override": override}


def test_options_reach_attention(module: types.ModuleType) -> None:
    q, split, other = torch.randn(1, 3, 8), Model(module), Model(module)
    comfy_patches.route_unhooked_calls(split, [NAME])
    assert split(q, transformer_options=OPTIONS) == "overridden"
    assert torch.is_tensor(other(q, transformer_options=OPTIONS)), "another model with this module stays as it is"
    assert torch.is_tensor(module.optimized_attention(q, q, q, 2))


def test_a_forward_that_fails_leaves_nothing_behind(module: types.ModuleType) -> None:
    split = Model(module)
    comfy_patches.route_unhooked_calls(split, [NAME])
    with pytest.raises(AttributeError):
        split(None, transformer_options={})
    q = torch.randn(1, 3, 8)
    assert torch.is_tensor(module.optimized_attention(q, q, q, 2))
    assert split(q, transformer_options=OPTIONS) == "overridden"


class Choosing(Model):
    def forward(self, q: torch.Tensor, transformer_options: dict[str, Any]) -> torch.Tensor:
        return self.module.optimized_attention_for_device(q.device)(q, q, q, 2)


def test_options_reach_an_attention_that_is_chosen_by_device(module: types.ModuleType) -> None:
    del module.optimized_attention
    module.optimized_attention_for_device = comfy.ldm.modules.attention.optimized_attention_for_device
    q, split, other = torch.randn(1, 3, 8), Choosing(module), Choosing(module)
    for _ in range(2):
        comfy_patches.route_unhooked_calls(split, [NAME])
    assert split(q, transformer_options=OPTIONS) == "overridden"
    assert torch.is_tensor(other(q, transformer_options=OPTIONS)), "another model with this module stays as it is"
    here, stock = module.optimized_attention_for_device(q.device), comfy.ldm.modules.attention.attention_sub_quad
    assert here is not stock and here.__wrapped__ is stock


def test_is_opened_once(module: types.ModuleType) -> None:
    for _ in range(2):
        comfy_patches.route_unhooked_calls(Model(module), [NAME])
    assert module.optimized_attention.__wrapped__ is comfy.ldm.modules.attention.attention_pytorch


@pytest.mark.parametrize("door", ["optimized_attention", "optimized_attention_for_device"])
@pytest.mark.parametrize("function", [None, lambda *_: lambda q, k, v, heads: q])
def test_refuses_a_comfyui_that_has_changed(module: types.ModuleType, function: Any, door: str) -> None:
    module.optimized_attention = None
    setattr(module, door, function)
    with pytest.raises(RuntimeError, match=f"this version of ComfyUI has changed {NAME}: .* Update Raylight"):
        comfy_patches.route_unhooked_calls(Model(module), [NAME])


def test_a_replacement_ends_with_its_block(module: types.ModuleType) -> None:
    original = module.optimized_attention
    with pytest.raises(StopIteration), comfy_patches.replaced(module, "optimized_attention", lambda found: (found,)):
        assert module.optimized_attention == (original,)
        raise StopIteration
    assert module.optimized_attention is original


def test_refuses_to_replace_what_comfyui_does_not_have(module: types.ModuleType) -> None:
    with (
        pytest.raises(RuntimeError, match=rf"this ComfyUI has no {NAME}\.gone, which Raylight needs: update Raylight"),
        comfy_patches.replaced(module, "gone", lambda found: found),
    ):
        pass


def test_attributes_of_objects_and_classes_are_replaced(module: types.ModuleType) -> None:
    model, other = Model(module), Model(module)
    with comfy_patches.replaced_on(model, "forward", override):
        assert model(None) == "overridden"
    assert "forward" not in vars(model), "it is the class's again"
    with comfy_patches.replaced_on(Model, "forward", override):
        assert other(None) == "overridden"
    with comfy_patches.replaced_on(model, "__class__", torch.nn.Identity):
        assert model(3) == 3
    assert type(model) is Model


ROOT = Path(comfy_patches.__file__).parents[2]
OF_COMFYUI = ("comfy", "nodes", "folder_paths", "latent_preview", "execution", "server")
# `settings` sets the command line and folders of ComfyUI in a worker: configuration, and no replacement.
ALLOWED = ("raylight/dev/", "raylight/host/comfy_patches.py", "raylight/host/settings.py")


def test_nothing_else_sets_attributes_of_comfyui() -> None:
    paths = [*ROOT.glob("raylight/**/*.py"), *ROOT.glob("nodes/*.py")]
    files = {path.relative_to(ROOT).as_posix(): path for path in paths}
    found = {name: stored(path) for name, path in files.items() if not name.startswith(ALLOWED)}
    assert len(found) > 100
    assert {name: names for name, names in found.items() if names} == {}


def stored(path: Path) -> list[str]:
    """Attributes of ComfyUI's modules, and of what was imported from them, that the code of a file sets or deletes."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    imported = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            imported |= {(one.asname or one.name).split(".")[0] for one in node.names if is_of_comfyui(one.name)}
        elif isinstance(node, ast.ImportFrom) and not node.level and is_of_comfyui(node.module or ""):
            imported |= {one.asname or one.name for one in node.names}
    targets = [node for node in nodes if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load)]
    targets += [node.args[0] for node in nodes if isinstance(node, ast.Call) and is_setattr(node)]
    return [ast.unparse(one) for one in targets if root_of(one) in imported]


def is_of_comfyui(module: str) -> bool:
    return module.split(".")[0] in OF_COMFYUI


def is_setattr(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id in ("setattr", "delattr")


def root_of(node: ast.expr) -> str:
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""
