"""Which callbacks look at all of every step."""

from __future__ import annotations

from types import CellType, FunctionType, SimpleNamespace
from typing import Any

import comfy.samplers
import comfy.utils
import latent_preview
import pytest
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.latent_formats import Wan21

from raylight.driver.outer_sample import _looks_at_all, _previewer

NestedTensor = pytest.importorskip(
    "comfy.nested_tensor", reason="this ComfyUI has no latents of several kinds"
).NestedTensor
KINDS = [torch.arange(24.0).reshape(1, 2, 3, 4), torch.arange(5.0).reshape(1, 1, 5)]
PACKED, SHAPES = comfy.utils.pack_latents(KINDS)


class Shown:
    """Stands for the callback of ComfyUI's latent_preview."""

    __module__ = "latent_preview"

    def __init__(self) -> None:
        self.steps: list[tuple[Any, ...]] = []

    def __call__(self, *step: Any) -> None:
        self.steps.append(step)


class Animated(latent_preview.LatentPreviewer):
    """Shows a video as such, as previewers of some packs do."""

    def decode_latent_to_preview_image(self, preview_format: str, x0: torch.Tensor) -> None: ...


def around(callback: Any) -> FunctionType:
    """Return what ComfyUI's guider puts around a callback for latents of several kinds."""
    codes = comfy.samplers.CFGGuider.sample.__code__.co_consts
    code = next((one for one in codes if getattr(one, "co_name", "") == "callback"), None)
    if code is None:
        pytest.skip("this ComfyUI has no such function")
    held = {"packed_callback": callback, "latent_shapes": SHAPES}
    return FunctionType(code, vars(comfy.samplers), closure=tuple(CellType(held[name]) for name in code.co_freevars))


def test_comfyui_s_own_shows_a_preview_and_the_last_step() -> None:
    shown = Shown()
    assert _previewer(shown, None) is shown
    assert _previewer(None, None) is None
    assert _previewer(lambda *step: None, SHAPES) is None


@pytest.mark.parametrize("packed", [False, True])
def test_previewers_of_packs_see_all_of_a_step(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    model = SimpleNamespace(load_device=torch.device("cpu"), model=SimpleNamespace(latent_format=Wan21()))

    def made() -> bool:
        callback = latent_preview.prepare_callback(model, 2)
        return _looks_at_all(around(callback) if packed else callback)

    assert not made()
    with monkeypatch.context() as replacing:
        replacing.setattr(latent_preview.Latent2RGBPreviewer, "decode_latent_to_preview", lambda *_: None)
        assert made()
    monkeypatch.setattr(latent_preview, "get_previewer", lambda *_: Animated())
    assert made()
    assert not _looks_at_all(Shown())


def test_latents_of_several_kinds_are_unpacked_for_it() -> None:
    shown = Shown()
    call = _previewer(around(shown), SHAPES)
    assert call is not None
    call(0, None, None, 2)
    call(1, PACKED, PACKED, 2)
    assert shown.steps[0] == (0, None, None, 2)
    step, x0, x, total = shown.steps[1]
    assert (step, total) == (1, 2)
    for nested in (x0, x):
        assert isinstance(nested, NestedTensor)
        assert all(torch.equal(*pair) for pair in zip(nested.unbind(), KINDS, strict=True))
    around(shown)(1, PACKED, PACKED, 2)  # as ComfyUI itself does
    assert all(torch.equal(*pair) for pair in zip(shown.steps[2][1].unbind(), x0.unbind(), strict=True))


def test_other_callbacks_of_several_kinds_see_all_of_every_step() -> None:
    assert _previewer(around(lambda *step: None), SHAPES) is None
