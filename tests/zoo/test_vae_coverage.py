"""Every VAE class that ComfyUI makes is split by rows, or has a reason why not."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from functools import reduce

import comfy.sd
import pytest
from newest import of_the_newest
from torch import nn

from raylight.dev.vae_zoo import VAES
from raylight.driver.preflight import is_older, running
from raylight.plans.vae_rows import AUTOENCODER, LDM, REASONS, RULES, rule_for, why_not

# Classes in the table that ComfyUI has from a release on.
LATER = {
    f"{LDM}.lightricks.vae.na_diffusion_decoder.CausalDiffusionVAE": "0.33.0",
    f"{LDM}.minimax_music.dav.MiniMaxMusic3DAV": "0.33.0",
}


def made_by_comfyui() -> Iterator[str]:
    """Yield the class of each VAE that ComfyUI's loader makes; for a frame of others, that of its decoder."""
    tree = ast.parse(inspect.getsource(comfy.sd))
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            target = ast.unparse(node.targets[0])
            if target == "self.first_stage_model" and not ast.unparse(node.value.func).startswith("self."):
                name = ast.unparse(node.value.func)
                kind = reduce(getattr, name.split("."), comfy.sd if "." not in name else _Root())
                yield f"{kind.__module__}.{kind.__qualname__}"
        if isinstance(node, ast.keyword) and node.arg == "decoder_config" and isinstance(node.value, ast.Dict):
            yield ast.literal_eval(node.value.values[0])


class _Root:
    """Where `comfy.ldm...` is looked up."""

    comfy = comfy


def test_every_class_is_listed() -> None:
    made = set(made_by_comfyui()) - {f"{AUTOENCODER}.AutoencodingEngine"}
    assert len(made) > 15
    missing = made - set(RULES) - set(REASONS)
    assert not missing, f"neither a rule nor a reason in raylight/plans/vae_rows.py: {sorted(missing)}"


@of_the_newest
def test_no_class_is_listed_that_comfyui_has_not() -> None:
    later = {name for name, release in LATER.items() if is_older(running(), release)}
    assert (set(RULES) | set(REASONS)) - set(made_by_comfyui()) == later


def test_every_rule_is_measured() -> None:
    built = [tiny.build() for tiny in VAES.values()]
    rules = [rule_for(model) for model in built]
    assert {id(rule) for rule in rules} == {id(rule) for rule in RULES.values()}
    for tiny, model, rule in zip(VAES.values(), built, rules, strict=True):
        assert rule.rows_per_latent(model) * tiny.latent[-2] == tiny.image[-2]


class AudioOobleckVAE(nn.Module):
    """A class of the name of one that makes sound."""


AudioOobleckVAE.__module__ = "comfy.ldm.audio.autoencoder"


def test_rejects_sound() -> None:
    assert (
        why_not(AudioOobleckVAE()) == "class AudioOobleckVAE cannot be split by rows: it makes sound, which has no rows"
    )


def test_rejects_a_class_without_a_rule() -> None:
    with pytest.raises(ValueError, match="class Linear cannot be split by rows: Raylight has no rule for it"):
        rule_for(nn.Linear(1, 1))
