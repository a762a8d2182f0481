"""Patches of a model that is split: what they see is whole, and one that nobody knows is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy import TOY_PLAN

from raylight.parallel.plan import Stream
from raylight.parallel.tokens import TokenState
from raylight.worker.transformer_options import install_override, install_patches, wrap


class Recorder(torch.nn.Module):
    def forward(self, x: torch.Tensor, transformer_options: dict[str, Any]) -> dict[str, Any]:
        return transformer_options


def sharded() -> TokenState:
    tokens = TokenState(0, 2)
    tokens.shard(torch.zeros(1, 6, 4), Stream("img"))
    return tokens


def test_a_patch_of_an_unknown_kind_is_refused_where_tokens_are_split() -> None:
    patch = wrap("single_block", lambda arguments: arguments, TOY_PLAN, sharded())
    with pytest.raises(ValueError, match=r"Toy is split over workers, and there a 'single_block' patch .* GPU = 1"):
        patch({"img": torch.zeros(1, 3, 4)})


def test_a_replaced_block_is_refused_before_the_split_too() -> None:
    patch = wrap("double_block", lambda arguments, more: arguments, TOY_PLAN, TokenState(0, 2), replaces=True)
    with pytest.raises(ValueError, match="a 'double_block' patch is not supported"):
        patch({"img": torch.zeros(1, 6, 4)}, {"original_block": None})


def test_a_patch_before_the_split_is_called_as_it_is() -> None:
    patch = wrap("post_input", lambda arguments: arguments, TOY_PLAN, TokenState(0, 2))
    arguments = {"img": torch.zeros(1, 3, 4)}
    assert patch(arguments) is arguments


def test_the_options_of_the_caller_stay_as_they_are() -> None:
    model = Recorder()
    patch = after = lambda arguments: arguments
    options = {"patches": {"double_block": [patch]}, "patches_replace": {"dit": {("double_block", 0): after}}}
    handle = install_patches(model, TOY_PLAN, sharded())
    seen = model(torch.zeros(1), transformer_options=options)
    assert seen["patches"]["double_block"][0] is not patch
    assert seen["patches_replace"]["dit"]["double_block", 0] is not after
    assert options == {"patches": {"double_block": [patch]}, "patches_replace": {"dit": {("double_block", 0): after}}}
    handle.remove()
    assert model(torch.zeros(1), transformer_options=options) is options


@pytest.mark.parametrize("asked", [{}, {"low_precision_attention": True}, {"low_precision_attention": False}])
def test_calls_in_full_precision_go_to_the_precise_kernel(asked: dict[str, bool]) -> None:
    called = []

    def attend(kernel: Any, q: torch.Tensor, *_: Any) -> torch.Tensor:
        called.append(kernel)
        return q

    kernel = SimpleNamespace(precise=object())
    options: dict[str, Any] = {}
    install_override(options, attend, kernel)
    q = torch.zeros(1, 3, 8)
    options["transformer_options"]["optimized_attention_override"](None, q, q, q, 2, **asked)
    assert called == [kernel.precise if asked.get("low_precision_attention") is False else kernel]
