"""Code of packs in the place of ComfyUI's own is found in whatever form it is there."""

from __future__ import annotations

import functools
from typing import Any

import comfy.k_diffusion.sampling
import comfy.ldm.flux.math
import comfy.ldm.wan.model
import comfy.samplers
import pytest
from comfy.ldm.wan.model import WanAttentionBlock, WanModel

from raylight.driver import injected_code
from raylight.driver.injected_code import is_kernel
from raylight.host import foreign_code

CLASSES = (WanModel, WanAttentionBlock)


def theirs(*_: Any) -> None: ...


class Theirs:
    def __call__(self, *_: Any) -> None: ...

    def method(self, *_: Any) -> None: ...


class TheirBlock(WanAttentionBlock): ...


@pytest.fixture(autouse=True)
def this_file_is_of_a_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_code, "is_foreign_file", lambda path: path == __file__)
    assert injected_code.is_foreign is foreign_code.is_foreign


@pytest.mark.parametrize(
    "code", [theirs, functools.partial(theirs, 1), Theirs(), Theirs().method, functools.partial(Theirs().method)]
)
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (comfy.ldm.wan.model, "sinusoidal_embedding_1d"),
        (WanAttentionBlock, "forward"),
        (WanModel, "forward"),
        (comfy.ldm.flux.math, "rope"),
    ],
)  # called by way of another module
def test_in_the_place_of_a_models_function(owner: Any, name: str, code: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(foreign_code.replaced_in(CLASSES)) == []
    monkeypatch.setattr(owner, name, code)
    assert [(change.name, change.value) for change in foreign_code.replaced_in(CLASSES)] == [(name, code)]


def test_in_the_place_of_a_property(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WanModel, "forward", property(theirs))
    assert [change.name for change in foreign_code.replaced_in(CLASSES)] == ["forward"]


def test_a_class_of_which_the_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy.ldm.wan.model, "WanAttentionBlock", TheirBlock)
    assert list(foreign_code.replaced_in(CLASSES)) == []  # built before
    with pytest.raises(
        ValueError,
        match=r"comfy\.ldm\.wan\.model\.WanAttentionBlock, of which it is built, was "
        r"replaced by TheirBlock of the node pack",
    ):
        list(foreign_code.replaced_in((WanModel, TheirBlock)))


def sageattn(*_: Any) -> None: ...


def test_an_override_that_calls_a_library_of_kernels() -> None:
    def fast(attention: Any, *args: Any, **kwargs: Any) -> Any:
        return sageattn(*args, **kwargs)

    def deeper(attention: Any, *args: Any, **kwargs: Any) -> Any:
        return fast(attention, *args, **kwargs)

    assert is_kernel(fast) and is_kernel(deeper) and is_kernel(functools.partial(deeper))
    assert is_kernel(comfy.ldm.wan.model.optimized_attention)
    assert not is_kernel(theirs) and not is_kernel(Theirs()) and not is_kernel(functools.partial(theirs))


def test_what_is_only_added_takes_the_place_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy.k_diffusion.sampling, "sample_theirs", theirs, raising=False)
    monkeypatch.setattr(comfy.samplers.CFGGuider, "their_method", theirs, raising=False)
    assert foreign_code.replaced_in_loop() == []
    monkeypatch.setattr(comfy.k_diffusion.sampling, "sample_euler", functools.partial(theirs))
    assert [change.place for change in foreign_code.replaced_in_loop()] == ["comfy.k_diffusion.sampling.sample_euler"]
