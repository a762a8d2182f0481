"""The probe drafts for known models what their plans say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from raylight.dev.demo.tiny import write_checkpoint
from raylight.dev.zoo.probe import __main__
from raylight.dev.zoo.probe.report import report

ROOT = Path(__file__).resolve().parents[2]
LINES = {
    "Flux Dev": [
        '            "img": Stream("img"),',
        '            "txt": Stream("txt"),',
        "note: x is local already: txt and img, one after the other",
        '        "single_blocks.*": SelfAttention(("txt", "img")),',
        '    outputs={"single_blocks.-1": Gather("img", after=("txt",))},',
    ],
    "Wan T2V": [
        '            "x": Stream("img"),',
        '            "freqs": Aligned(("img",)),',
        '        "blocks.*.cross_attn": CrossAttention(("img",)),',
        "it stays full",
    ],
    "Cosmos T2V": [
        '            "x": Stream("img", dim=0, grid=3),',
        '            "rope_emb_L_1_1_D": Aligned(("img",), dim=0),',
    ],
    "Z-Image": ['        "noise_refiner.*": {', '            "freqs_cis": Aligned(("txt", "img")),'],
    "Hunyuan Video": ['        "double_blocks.*": SelfAttention(("img", "txt")),'],
}


@pytest.mark.parametrize("name", LINES)
def test_draft(name: str) -> None:
    text = report(name, [], "meta")
    for line in LINES[name]:
        assert line in text


def test_says_where_attention_is_not_seen() -> None:
    assert "attends nowhere that ComfyUI's hook sees: name its Python module in `unhooked`" in report(
        "Ernie Image", [], "cpu"
    )


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "flux.safetensors"
    write_checkpoint(path, "flux-dev")
    text = report(str(path), [], "meta")
    assert '"pe": Aligned(("txt", "img"), dim=2)' in text


def test_finds_comfyui_by_itself() -> None:
    command = [sys.executable, "-m", "raylight.dev.zoo.probe", "--help"]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60).stdout
    assert text.startswith("usage: python -m raylight.dev.zoo.probe")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["c_crossattn=1,T,7"], "WanModel could not be called with .* Give what it needs with --input"),
        (["c_crossattn=1;T;7"], "--input c_crossattn=1;T;7: write it as c_crossattn=1,T,4096"),
    ],
)
def test_says_what_is_wrong_with_an_input(tmp_path: Path, given: list[str], message: str) -> None:
    path = tmp_path / "wan.safetensors"
    write_checkpoint(path, "wan-t2v")
    with pytest.raises(ValueError, match=message):
        report(str(path), given, "meta")


def test_says_what_is_wrong_with_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["nothing"]) == 1
    assert "nothing: neither a .safetensors file nor one of the families: " in capsys.readouterr().err
    (tmp_path / "text.safetensors").write_text("not weights")
    assert __main__.main([str(tmp_path / "text.safetensors")]) == 1
    assert "not a safetensors file" in capsys.readouterr().err
