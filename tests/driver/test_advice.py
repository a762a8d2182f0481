"""Raylight Advice: what it says of files and sizes, without workers and after a run on some."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import own_pack
import pytest
from comfy_cases import CASES, checkpoint, sample_on_workers

from raylight.cluster.config import ANY, SessionConfig
from raylight.cluster.place import Place
from raylight.dev.zoo import families
from raylight.driver import advice
from raylight.driver.advice import advise
from raylight.driver.model_size import measure
from raylight.host.recipe import SHARDED, ModelRecipe, RayModel, WorkerConfig
from raylight.parallel.degrees import Arrangement
from raylight.parallel.estimate import Hardware
from raylight.parallel.mesh import MeshShape

TWO = SessionConfig(MeshShape(ulysses=2), "cpu")
FOUR = SessionConfig(MeshShape(ulysses=4), "cuda", by_run=True)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models"), CASES["Wan T2V"])


def model_of(path: Path, config: SessionConfig, sharding: str = "replicated", attention: str = "TORCH") -> RayModel:
    return RayModel(WorkerConfig(config, attention, sharding=sharding), ModelRecipe.of(str(path), "default", sharding))


def four_gpus(monkeypatch: pytest.MonkeyPatch, gigabytes: float) -> None:
    card = SimpleNamespace(name="RTX 5090", total_memory=int(gigabytes * 1e9))
    monkeypatch.setattr(advice.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(advice.torch.cuda, "get_device_properties", lambda _: card)


def test_says_what_is_chosen_for_gpus_that_have_no_workers_yet(wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    four_gpus(monkeypatch, 32)
    text = advise(model_of(wan, FOUR), 832, 480, 33)
    assert re.search(r"WanModel, .* GB of weights, \d+ attention heads; at 832x480, 33 frames 14040 tokens", text)
    assert "4 workers: degrees by the run; 4 x RTX 5090 32.00 GB" in text
    assert "Choose FSDP off." in text
    assert re.search(r"with CFG.*: batch 2 x ulysses 2 \(2 rows over 2 groups\): about \d\.\d times as fast", text)
    assert "Seconds are told when the workers run on GPUs" in text


def test_a_cluster_that_decides_has_what_its_workers_have(wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_config = SessionConfig(MeshShape(), ANY, "host:6379", by_run=True, grows="ulysses")
    model = model_of(wan, open_config)
    text = advise(model, 832, 480, 33)
    assert "1 or more workers: degrees by the run; start them once to see what memory they have" in text
    places = {rank: Place(rank, f"10.0.0.{rank}", 1, "RTX 5090", 0) for rank in range(2)}
    session = SimpleNamespace(config=open_config.grown(2, "cuda"), places=places, links=None)
    session.arrangement_by = lambda config: Arrangement(config.mesh, config.by_run)
    monkeypatch.setattr(advice.active_session, "running", lambda: session)
    memory = dict.fromkeys(places, SimpleNamespace(total_bytes=32 * 10**9))
    monkeypatch.setattr(advice, "ask_all", lambda *_: memory)
    assert "2 workers: degrees by the run; 2 x RTX 5090 32.00 GB" in advise(model, 832, 480, 33)


@pytest.mark.parametrize(("attention", "is_told"), [("auto", False), ("TORCH_FLASH", True)])
def test_seconds_are_those_of_one_attention(
    wan: Path, monkeypatch: pytest.MonkeyPatch, attention: str, is_told: bool
) -> None:
    four_gpus(monkeypatch, 32)
    hardware = Hardware((10**14,) * 4, (10**14,) * 4, 10**11, 1e-5, (10**12,) * 4)
    monkeypatch.setattr(advice, "_hardware", lambda _: hardware)
    text = advise(model_of(wan, FOUR, attention=attention), 832, 480, 33)
    assert re.search(r"about \S+ s a forward", text)
    assert (f"Seconds are those of attention auto; {attention} was not tried." in text) == is_told


def test_workers_on_cpus_share_the_memory_of_their_machine(wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SessionConfig(MeshShape(ulysses=3), "cpu", "host:6379")
    places = {
        rank: Place(rank, "10.0.0.1", 1, "cpu", machine=name, node=name) for rank, name in enumerate(("a", "a", "b"))
    }
    session = SimpleNamespace(config=config, places=places, links=None)
    monkeypatch.setattr(advice.active_session, "running", lambda: session)
    memory = dict.fromkeys(places, SimpleNamespace(total_bytes=32 * 10**9))
    monkeypatch.setattr(advice, "ask_all", lambda *_: memory)
    cards = advice._cards(model_of(wan, config))
    assert cards.total_bytes == (16 * 10**9, 16 * 10**9, 32 * 10**9)


@pytest.mark.parametrize(
    ("gigabytes", "chosen"), [(80, "FSDP off"), (24, "FSDP"), (12, "FSDP and FSDP_CPU_OFFLOAD"), (4, None)]
)
def test_chooses_the_first_way_that_fits(
    wan: Path, monkeypatch: pytest.MonkeyPatch, gigabytes: float, chosen: str | None
) -> None:
    four_gpus(monkeypatch, gigabytes)
    recipe = model_of(wan, FOUR).recipe
    large = SimpleNamespace(name="large.safetensors", size=40 * 10**9, path=recipe.path)
    size = advice.ModelSize("Large", (1, 16, 9, 60, 104), 40, 16 * 10**9, measured(wan).work)
    lines = advice._fits(large, size, FOUR.mesh, advice._cards(model_of(wan, FOUR)))
    assert lines[-1] == (
        f"Choose {chosen}." if chosen else "None fits: choose a smaller size, or a file with fp8 or GGUF."
    )
    assert all("4.00 GB to compute" in line for line in lines[:3]), "tokens are split over four"


def test_fsdp_fits_where_unlike_gpus_hold_by_their_memory(wan: Path) -> None:
    two = SessionConfig(MeshShape(ulysses=2), "cuda")
    cards = advice._Cards(two, ("RTX 5090", "RTX 4080"), (32 * 10**9, 16 * 10**9), True)
    recipe = model_of(wan, two).recipe
    large = SimpleNamespace(name="large.safetensors", size=30 * 10**9, path=recipe.path)
    size = advice.ModelSize("Large", (1, 16, 9, 60, 104), 40, 4 * 10**9, measured(wan).work)
    _, fsdp, *_, choice = advice._fits(large, size, two.mesh, cards)
    # 30 GB are held so that 9 GB are left on each, and three of 40 blocks are there in full.
    assert fsdp == "    FSDP: 25.25 GB, 9.25 GB of weights and about 2.00 GB to compute on each: fits"
    assert choice == "Choose FSDP."


def measured(path: Path, width: int = 832, height: int = 480, frames: int = 33) -> advice.ModelSize:
    recipe = ModelRecipe.of(str(path), "default")
    return measure(advice.weightless.build(recipe, advice.forward_on_workers), width, height, frames)


def test_tokens_of_a_model_without_patches() -> None:
    found = measure(families()["LTX-Video"].build(), 1216, 704, 121)
    assert found.work is not None and found.work.tokens == 16 * 22 * 38


def test_tokens_follow_the_size(wan: Path) -> None:
    first = measured(wan)
    assert first.work.tokens == 9 * 30 * 52 and first.latent == (1, 16, 9, 60, 104)
    assert measured(wan, 416, 480, 1).work.tokens == 30 * 26
    assert first.work.attentions == first.blocks > 0


def test_shows_what_was_measured_and_starts_nothing(wan: Path) -> None:
    model = model_of(wan, TWO, SHARDED)
    assert "No run of this file was measured" in advise(model, 112, 80, 9)
    sample_on_workers(model, CASES["Wan T2V"])
    text = advise(model, 112, 80, 9)
    assert re.search(r"\d s a step: latent 1x16x3x14x18, \d+ steps, 2 workers \(batch 1 x ring 1 x Ulysses 2", text)
    assert "weights sharded)" in text


def test_the_node_shows_it(wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(wan.parent)], {".safetensors"}))
    node = own_pack.load()["RaylightAdvice"]
    workers = WorkerConfig(TWO, "TORCH")
    shown = node.execute(unet_name=wan.name, width=832, height=480, frames=33, ray_actors_init=workers)
    (text,) = shown.result
    assert "at 832x480, 33 frames 14040 tokens" in text and shown.ui.as_dict()["text"] == (text,)
