"""Whether a patch fits is known before it is applied, and is what ComfyUI finds when it is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.lora
import pytest
import torch
from comfy.weight_adapter import LoKrAdapter, LoRAAdapter, OFTAdapter
from loras import KINDS
from safetensors.torch import save_file
from torch import Tensor

from raylight.host.recipe import LoraRecipe
from raylight.worker import lora
from raylight.worker.lora import WeightShapes

OUT, WIDTH = 24, 16
NAME = "diffusion_model.layer.weight"
KEYS = {"layer": NAME}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _locon(out: int, width: int, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    return {
        "lora_up.weight": draw(out, 3, 1, 1),
        "lora_down.weight": draw(3, width, 1, 1),
        "lora_mid.weight": draw(3, 3, 2, 2),
        "alpha": torch.tensor(2.0),
    }


def _loha_of_cores(out: int, width: int, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    return {
        "hada_w1_a": draw(3, out),
        "hada_w1_b": draw(3, width),
        "hada_t1": draw(3, 3, 2, 2),
        "hada_w2_a": draw(3, out),
        "hada_w2_b": draw(3, width),
        "hada_t2": draw(3, 3, 2, 2),
    }


def _set(out: int, width: int, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    return {"set_weight": draw(out, width)}


def _boft_without_alpha(out: int, width: int, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    return {"oft_blocks": draw(1, out // 2, 2, 2)}


MADE = {**KINDS, "set": _set, "boft without alpha": _boft_without_alpha}
CONVOLUTIONS = {"locon": _locon, "loha of cores": _loha_of_cores}
SIZES = [(OUT, WIDTH), (OUT, 2 * WIDTH), (OUT // 2, WIDTH), (WIDTH, OUT), (OUT + 2, WIDTH + 2)]


def patches_of(tensors: dict[str, Tensor]) -> dict[Any, Any]:
    return comfy.lora.load_lora({f"layer.{key}": tensor for key, tensor in tensors.items()}, KEYS)


def by_comfyui(value: Any, shape: tuple[int, ...]) -> Any:
    """Whether ComfyUI changes a real weight by a patch, or the error with which it ends."""
    weight = 1 + draw(*shape)
    try:
        after = comfy.lora.calculate_weight([(1.0, value, 1.0, None, None)], weight.clone(), NAME)
    except Exception as error:
        return type(error)
    return not torch.equal(after, weight)


def by_shapes(value: Any, shape: tuple[int, ...]) -> Any:
    try:
        return WeightShapes({NAME: shape}).fits(NAME, value)
    except ValueError as error:
        return type(error.__cause__)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [*((kind, (OUT, WIDTH)) for kind in MADE), *((kind, (OUT, WIDTH, 2, 2)) for kind in CONVOLUTIONS)],
)
def test_fits_what_comfyui_applies(kind: str, shape: tuple[int, ...], caplog: pytest.LogCaptureFixture) -> None:
    found = set()
    for size in SIZES:
        value = patches_of((MADE | CONVOLUTIONS)[kind](*size, draw))[NAME]
        caplog.clear()
        fits = by_shapes(value, shape)
        assert not caplog.records
        assert fits == by_comfyui(value, shape), size
        found.add(fits)
    assert len(found) > 1 or kind == "boft without alpha"


def test_factors_that_do_not_fit_each_other_end_the_run_as_in_comfyui() -> None:
    tensors = KINDS["loha"](OUT, WIDTH, draw)
    value = patches_of(tensors | {"hada_w1_b": draw(5, WIDTH)})[NAME]
    assert by_shapes(value, (OUT, WIDTH)) is by_comfyui(value, (OUT, WIDTH)) is RuntimeError


def test_a_shape_that_one_patch_changes_is_that_of_the_next() -> None:
    wide = LoRAAdapter(set(), (draw(OUT, 3), draw(3, 2 * WIDTH), None, None, None, [OUT, 2 * WIDTH]))
    second = LoRAAdapter(set(), (draw(OUT, 3), draw(3, 2 * WIDTH), None, None, None, None))
    shapes = WeightShapes({NAME: (OUT, WIDTH)})
    assert not shapes.fits(NAME, second)
    assert shapes.fits(NAME, wide)
    assert shapes.text(NAME) == f"{OUT} x {2 * WIDTH}"
    assert shapes.fits(NAME, second)


def test_a_region_of_a_weight() -> None:
    value = LoRAAdapter(set(), (draw(OUT // 3, 3), draw(3, WIDTH), None, None, None, None))
    shapes = WeightShapes({NAME: (OUT, WIDTH)})
    assert shapes.fits(NAME, value, (0, OUT // 3, OUT // 3))
    assert not shapes.fits(NAME, value, (0, 0, OUT // 2))
    assert shapes.zero_patch(NAME, (0, 0, OUT // 2))[1][0].shape == (OUT // 2, WIDTH)


def test_fits_if_only_a_real_weight_can_decide() -> None:
    class Unknown(LoKrAdapter):
        def calculate_weight(self, *_: Any) -> Tensor:
            raise RuntimeError("of another pack")

    assert WeightShapes({NAME: (OUT, WIDTH)}).fits(NAME, Unknown(set(), ()))
    assert WeightShapes({NAME: (OUT, WIDTH)}).fits(NAME, OFTAdapter(set(), (draw(4, 6, 6), None, 5.0, None)))
    assert WeightShapes({NAME: (OUT, WIDTH)}).fits(NAME, [(draw(3), None)])  # of a merge


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        value = patches_of(KINDS["dora"](OUT, WIDTH, draw))[NAME]
        shapes = WeightShapes({NAME: (OUT, WIDTH)})
        assert shapes.fits(NAME, value)
        assert not WeightShapes({NAME: (WIDTH, WIDTH)}).fits(NAME, value)


SHAPES = {f"diffusion_model.{name}.weight": (OUT, WIDTH) for name in ("a", "b", "c")}
NAMES = {name: f"diffusion_model.{name}.weight" for name in "abc"}


def a_lora(**sizes: tuple[int, int]) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor for name, size in sizes.items() for key, tensor in KINDS["lora"](*size, draw).items()
    }


def test_warns_once_of_what_does_not_fit() -> None:
    fitted = lora.fit_lora("turbo", a_lora(a=(OUT, WIDTH), b=(OUT, 9), c=(OUT, 9)), NAMES, WeightShapes(SHAPES))
    assert fitted.warnings == [
        "the LoRA turbo fits in part: 2 of its 3 layers do not fit the model and are left out "
        "(diffusion_model.b.weight, here 24 x 16, diffusion_model.c.weight, here 24 x 16)"
    ]
    assert isinstance(fitted.patches[NAMES["a"]], LoRAAdapter)
    for name in "bc":
        assert (
            comfy.lora.calculate_weight(
                [(0.7, fitted.patches[NAMES[name]], 1.0, None, None)], torch.ones(OUT, WIDTH), name
            )
            .eq(1)
            .all()
        )


def test_a_file_with_bytes_after_the_last_tensor(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(a_lora(a=(OUT, WIDTH)), path)
    path.write_bytes(path.read_bytes() + bytes(5))
    fitted = lora.read_lora(LoraRecipe.of(str(path), 1.0), NAMES, WeightShapes(SHAPES))
    assert torch.equal(fitted.patches[NAMES["a"]].weights[0], a_lora(a=(OUT, WIDTH))["a.lora_up.weight"])


@pytest.mark.parametrize("content", [[1], torch.zeros(3), {"a": {"b": 1}}])
def test_refuses_pickles_of_something_else(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=r"lora\.pt"):
        lora.read_lora(LoraRecipe.of(str(tmp_path / "lora.pt"), 1.0), NAMES, WeightShapes(SHAPES))


def test_warns_of_what_has_no_place_but_not_of_a_text_encoder(caplog: pytest.LogCaptureFixture) -> None:
    tensors = a_lora(a=(OUT, WIDTH), k_img=(OUT, 9)) | {"lora_te_text_model_encoder_layers_0.alpha": torch.ones(())}
    fitted = lora.fit_lora("lightx2v", tensors, NAMES, WeightShapes(SHAPES))
    assert len(fitted.warnings) == 1
    assert "3 tensors or layers that this model does not have" in fitted.warnings[0]
    assert "k_img.lora_up.weight" in fitted.warnings[0]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (lambda: {}, "the LoRA x is empty"),
        (
            lambda: {f"lora_te_text_model_{name}": value for name, value in a_lora(a=(OUT, WIDTH)).items()},
            "is for the text encoder only.*Load LoRA on the CLIP",
        ),
        (
            lambda: {f"base_model.model.{name}": value for name, value in a_lora(a=(OUT, WIDTH)).items()},
            r"knows none of the names of its 3 tensors \(base_model\.model\.a\..*another model, or was saved by a tool",
        ),
        (lambda: a_lora(a=(OUT, 9), b=(9, WIDTH)), r"is for another model.*none of its 2 layers fits \(.*24 x 16"),
        (lambda: {"a.set_weight": draw(5, 5)}, r"a\.weight cannot be applied to a weight of 24 x 16"),
        (lambda: {"a.lora_up.weight": draw(5, 5)}, r"the tensor a\.lora_down\.weight is missing"),
        (
            lambda: {"a.lora_up.weight": draw(OUT, 3), "a.lora_down.weight": draw(3, WIDTH), "a.alpha": draw(2)},
            "x cannot be read as a LoRA",
        ),
        (
            lambda: {"a.lora_up.weight": "text", "a.lora_down.weight": "text"},
            "the LoRA x is damaged or for another model",
        ),
    ],
)
def test_refuses(tensors: Callable[[], dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lora.fit_lora("x", tensors(), NAMES, WeightShapes(SHAPES))
