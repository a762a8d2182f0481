"""LoRAs of every kind on split weights of every kind, against ComfyUI's."""

from __future__ import annotations

import pytest
from loaded_cases import Patched, compare_patched
from loras import KINDS
from quantised import FORMATS, quantise

from raylight.dev.demo.tiny import write_checkpoint
from raylight.dev.local_ranks import run_ranks, values

HEADS = 4


ALL = tuple(KINDS)
CASES = {
    2: [*(("plain", "default", (kind,)) for kind in KINDS), *((form, "default", ALL) for form in FORMATS)],
    3: [("plain", dtype, ALL) for dtype in ("default", "bfloat16", "float8_e4m3fn")],
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[Patched]]]:
    folder = tmp_path_factory.mktemp("patched")
    paths = {form: folder / f"{index}.safetensors" for index, form in enumerate(("plain", *FORMATS))}
    write_checkpoint(paths["plain"], "wan-t2v", heads=HEADS, layers=1)
    for form in FORMATS:
        quantise(paths["plain"], paths[form], form)
    return {
        world: values(
            run_ranks(world, compare_patched, tuple((paths[form], *rest) for form, *rest in cases), timeout_s=300)
        )
        for world, cases in CASES.items()
    }


@pytest.mark.parametrize(
    ("world", "form", "dtype", "kinds"), [(world, *case) for world, cases in CASES.items() for case in cases]
)
def test_lora(world: int, form: str, dtype: str, kinds: tuple[str, ...], measured) -> None:
    index = CASES[world].index((form, dtype, kinds))
    for rank in (results[index] for results in measured[world]):
        assert rank.effect > 0.1
        # Products of some rows may be summed in another order than those of all.
        assert rank.error <= (1e-4 if dtype == "default" and form == "plain" else 0.02 if dtype == "bfloat16" else 0.0)
        assert rank.changed == 0.0
        assert rank.removed == 0.0
        assert rank.back == 0.0
