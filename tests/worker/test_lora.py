"""LoRAs of every kind on split weights of every kind, against ComfyUI's."""

from __future__ import annotations

import pytest
from loaded_cases import REGIONS, Patched, compare_patched, compare_regions
from loras import KINDS
from quantised import FORMATS, quantise

from raylight.dev.demo.tiny import write_checkpoint
from raylight.dev.local_ranks import run_ranks, values

HEADS = 4


ALL = tuple(KINDS)
UNLIKE = (3 << 20, 1 << 20)  # bytes of memory, so that the second rank holds 2 MiB less than the first
CASES = {
    (2, ()): [*(("plain", "default", (kind,)) for kind in KINDS), *((form, "default", ALL) for form in FORMATS)],
    (3, ()): [("plain", dtype, ALL) for dtype in ("default", "bfloat16", "float8_e4m3fn")],
    (2, UNLIKE): [(form, "default", ALL) for form in ("plain", *FORMATS)],
}
Measured = dict[tuple[int, tuple[int, ...]], list[list[Patched]]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("patched")
    paths = {form: folder / f"{index}.safetensors" for index, form in enumerate(("plain", *FORMATS))}
    write_checkpoint(paths["plain"], "wan-t2v", heads=HEADS, layers=1)
    for form in FORMATS:
        quantise(paths["plain"], paths[form], form)
    return {
        (world, memory): values(
            run_ranks(
                world, compare_patched, tuple((paths[form], *rest) for form, *rest in cases), memory, timeout_s=300
            )
        )
        for (world, memory), cases in CASES.items()
    }


@pytest.mark.parametrize(
    ("ranks", "form", "dtype", "kinds"), [(ranks, *case) for ranks, cases in CASES.items() for case in cases]
)
def test_lora(
    ranks: tuple[int, tuple[int, ...]], form: str, dtype: str, kinds: tuple[str, ...], measured: Measured
) -> None:
    index = CASES[ranks].index((form, dtype, kinds))
    for rank in (results[index] for results in measured[ranks]):
        assert rank.effect > 0.1
        # Products of some rows may be summed in another order than those of all.
        assert rank.error <= (1e-4 if dtype == "default" and form == "plain" else 0.02 if dtype == "bfloat16" else 0.0)
        assert rank.changed == 0.0
        assert rank.removed == 0.0
        assert rank.back == 0.0


@pytest.mark.parametrize("world", [2, 3])
def test_a_lora_of_some_rows_is_that_of_comfyui(world: int) -> None:
    # A rank whose rows have no such patch gathers the weight with the others, or they would wait for it.
    for differences in values(run_ranks(world, compare_regions, timeout_s=60, collective_timeout_s=20)):
        assert dict(zip(REGIONS, differences, strict=True)) == pytest.approx(dict.fromkeys(REGIONS, 0.0), abs=1e-5)
