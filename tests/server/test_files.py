"""Model files and LoRAs in their usual forms, on a real server: stock's image by every way of Raylight, with one
warning, or a refusal after which the same workers go on.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from loras import KINDS
from safetensors.torch import load_file, save_file
from torch import Tensor

from raylight.dev.demo.comfy_replies import PromptFailed
from raylight.dev.demo.comfy_server import ComfyServer
from raylight.dev.demo.graphs import Graph, Sampling, node, on_workers, stock
from raylight.dev.demo.prompts import random_prompt, write_prompt
from raylight.dev.demo.tiny import write_checkpoint

pytestmark = pytest.mark.slow

JOB = Sampling("wan.safetensors", width=80, height=64, frames=5, steps=2)
WAYS = ("ray", "drop-in", "parallelize")


def draw(*shape: int) -> Tensor:
    return 0.08 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("files")
    write_checkpoint(models / "wan.safetensors", "wan-t2v", heads=2)
    tensors = load_file(models / "wan.safetensors")
    save_file(
        tensors
        | {
            "norm_final.weight": torch.ones(384),
            "pos_embedder.seq": torch.arange(240.0),
            "adaln_basis": torch.zeros(8, 384),
        },
        models / "excess.safetensors",
    )
    in_8_bits = {
        name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 and "blocks" in name else tensor
        for name, tensor in tensors.items()
    }
    save_file(
        in_8_bits
        | {
            name.replace(".weight", ".weight_scale"): torch.tensor(0.02)
            for name, tensor in in_8_bits.items()
            if tensor.dtype == torch.float8_e4m3fn
        },
        models / "noise.safetensors",
    )
    shapes = {name.removesuffix(".weight"): tuple(tensor.shape) for name, tensor in tensors.items()}
    q, ffn = shapes["blocks.0.self_attn.q"], shapes["blocks.0.ffn.0"]

    def lora(name: str, **layers: Any) -> None:
        save_file({f"diffusion_model.{key}": tensor for key, tensor in layers.items()}, models / f"{name}.safetensors")

    def layer(kind: str, at: str, shape: tuple[int, int]) -> dict[str, Tensor]:
        return {f"{at}.{key}": tensor for key, tensor in KINDS[kind](*shape, draw).items()}

    good = layer("lora", "blocks.0.self_attn.q", q)
    for kind in KINDS:
        lora(f"misfit {kind}", **good, **layer(kind, "blocks.1.ffn.0", (ffn[0] + 8, ffn[1] + 16)))
    lora(
        "misfit convolution",
        **good,
        **{
            "patch_embedding.lora_up.weight": draw(q[0], 4, 1, 1, 1),
            "patch_embedding.lora_down.weight": draw(4, 36, 1, 2, 2),
        },
    )
    lora("misfit set", **good, **{"blocks.1.ffn.0.set_weight": draw(7, 9)})
    lora("misfits only", **layer("lora", "blocks.0.self_attn.q", (q[0] + 1, q[1])))
    lora("other names", **{f"other.{key}": tensor for key, tensor in good.items()})
    save_file(
        {
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": draw(8, 4),
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": draw(4, 8),
        },
        models / "text.safetensors",
    )
    lora("in place", **good)
    return models


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    work = tmp_path_factory.mktemp("comfyui")
    write_prompt(work / "datasets" / "positive", random_prompt(9, 4096, seed=1))
    write_prompt(work / "datasets" / "negative", random_prompt(6, 4096, seed=2))
    with ComfyServer(
        work, model_paths={"diffusion_models": folder, "loras": folder, "datasets": work / "datasets"}
    ) as running:
        yield running


def graph_of(way: str, model: str, lora: str | None = None, fsdp: bool = False, strength: float = 1.0) -> Graph:
    """`way` is "stock" or one of WAYS."""
    job = Sampling(**{name: getattr(JOB, name) for name in ("width", "height", "frames", "steps")}, model=model)
    if way == "ray":
        graph = on_workers(job, 2, FSDP=fsdp)
        if lora is not None:
            graph["lora"] = node("RayLoraLoader", lora_name=lora, strength_model=strength)
            graph["model"]["inputs"]["lora"] = ["lora", 0]
        return graph
    graph = copy.deepcopy(stock(job))
    if way != "stock":
        graph["workers"] = on_workers(job, 2, FSDP=fsdp)["workers"]
    if way == "drop-in":
        graph["model"] = node("RayModelLoader", **graph["model"]["inputs"], ray_actors_init=["workers", 0])
    last = "model"
    if lora is not None:
        graph["lora"] = node("LoraLoaderModelOnly", lora_name=lora, strength_model=strength, model=[last, 0])
        last = "lora"
    if way == "parallelize":
        graph["parallel"] = node("RayParallelizeModel", model=[last, 0], ray_actors_init=["workers", 0])
        last = "parallel"
    graph["sample"]["inputs"]["model"] = [last, 0]
    return graph


def latent(server: ComfyServer, graph: Graph) -> Tensor:
    return load_file(server.output_files(server.run(graph, timeout=120), "save")[0])["latent_tensor"]


def since(server: ComfyServer, begin: int) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", server.log.read_bytes()[begin:].decode("utf-8", errors="replace"))


def difference(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.std()).item()


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_file_with_tensors_in_excess(server: ComfyServer, fsdp: bool) -> None:
    expected = latent(server, graph_of("stock", "excess.safetensors"))
    server.free()
    begin = server.log.stat().st_size
    for way in WAYS:
        assert difference(latent(server, graph_of(way, "excess.safetensors", fsdp=fsdp)), expected) <= 1e-4
    log = since(server, begin)
    # Once by Raylight, for all ways and ranks, and once by the loader before Parallelize Model.
    assert len(re.findall("is loaded without 3 of its tensors", log)) <= 1
    assert len(re.findall("unet unexpected", log)) <= 2


MISFITS = [*(f"misfit {kind}" for kind in KINDS), "misfit convolution"]


@pytest.mark.parametrize("lora", MISFITS)
def test_a_lora_is_put_on_where_it_fits(server: ComfyServer, lora: str) -> None:
    file = f"{lora}.safetensors"
    expected = latent(server, graph_of("stock", "wan.safetensors", file))
    for way, fsdp in [(way, fsdp) for fsdp in (False, True) for way in (WAYS if lora in MISFITS[::5] else WAYS[:2])]:
        begin = server.log.stat().st_size
        assert difference(latent(server, graph_of(way, "wan.safetensors", file, fsdp)), expected) <= 1e-4
        log = since(server, begin)
        share = "2 of (its )?3" if lora == "misfit diff" else "1 of (its )?2"  # with the bias
        assert len(re.findall(f"fits in part: {share} layers do not fit .*left out", log)) == 1, (way, fsdp)
        assert "ERROR" not in log and "SHAPE MISMATCH" not in log


@pytest.mark.parametrize("lora", ["misfit loha", "misfit set"])
def test_a_scheduled_lora_is_put_on_where_it_fits(server: ComfyServer, lora: str) -> None:
    def scheduled(way: str) -> Graph:
        graph = graph_of(way, "wan.safetensors")
        graph |= {
            "hook": node("CreateHookLora", lora_name=f"{lora}.safetensors", strength_model=1.0, strength_clip=0.0),
            "hooked": node(
                "ConditioningSetProperties",
                cond_NEW=["positive", 1],
                strength=1.0,
                set_cond_area="default",
                hooks=["hook", 0],
            ),
        }
        graph["sample"]["inputs"]["positive"] = ["hooked", 0]
        return graph

    if lora == "misfit set":
        latent(server, graph_of("drop-in", "wan.safetensors"))
        before = places(server)
        with pytest.raises(PromptFailed, match=r"blocks\.1\.ffn\.0\.weight cannot be applied to a weight of"):
            server.run(scheduled("drop-in"), timeout=120)
        assert places(server) == before
        return
    expected = latent(server, scheduled("stock"))
    assert difference(latent(server, graph_of("stock", "wan.safetensors")), expected) > 0.01
    begin = server.log.stat().st_size
    assert difference(latent(server, scheduled("drop-in")), expected) <= 1e-4
    log = since(server, begin)
    assert len(re.findall("the scheduled LoRA fits in part: 1 of 2 layers", log)) == 1
    assert "ERROR" not in log


def places(server: ComfyServer) -> set[int]:
    """The processes of the workers."""
    return {
        one.pid
        for one in psutil.Process(server.pid).children(recursive=True)
        if any("ray::" in part for part in one.cmdline()[:1])
    }


@pytest.mark.parametrize(
    ("model", "lora", "ways", "words"),
    [
        ("noise", None, WAYS, r"weights of 8 bits with scales that ComfyUI does not know"),
        ("wan", "misfit set", WAYS, r"blocks\.1\.ffn\.0\.weight cannot be applied to a weight of"),
        (
            "wan",
            "misfits only",
            WAYS[:1],
            r"is for another model, or another size of this one: none of its 1 layers fits",
        ),
        ("wan", "other names", WAYS[:1], r"ComfyUI knows none of the names of its \d tensors"),
        ("wan", "text", WAYS[:1], r"is for the text encoder only"),
    ],
)
def test_refuses_and_goes_on(
    server: ComfyServer, model: str, lora: str | None, ways: tuple[str, ...], words: str
) -> None:
    latent(server, graph_of("drop-in", "wan.safetensors"))
    before = places(server)
    assert len(before) >= 2
    for way in ways:
        with pytest.raises(PromptFailed, match=words):
            server.run(graph_of(way, f"{model}.safetensors", lora and f"{lora}.safetensors"), timeout=120)
    last = graph_of("drop-in", "wan.safetensors")
    last["sample"]["inputs"]["noise_seed"] += 1  # else there would be nothing to do
    latent(server, last)
    assert places(server) == before


@pytest.mark.parametrize("lora", ["misfits only", "other names", "text"])
def test_a_lora_without_effect_on_a_model_of_comfyuis_loader(server: ComfyServer, lora: str) -> None:
    """As ComfyUI: the picture without it, and warnings."""
    expected = latent(server, graph_of("stock", "wan.safetensors"))
    for way in WAYS[1:]:
        assert difference(latent(server, graph_of(way, "wan.safetensors", f"{lora}.safetensors")), expected) <= 1e-4


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_file_written_in_place_with_its_old_time(server: ComfyServer, folder: Path, fsdp: bool) -> None:
    model = folder / f"in-place-{fsdp}.safetensors"
    for seed in (0, 1):
        times = None if seed == 0 else (model.stat().st_atime_ns, model.stat().st_mtime_ns)
        write_checkpoint(folder / "new.safetensors", "wan-t2v", heads=2, seed=seed)
        with model.open("wb" if seed == 0 else "r+b") as file:
            file.write((folder / "new.safetensors").read_bytes())
        if times is not None:
            os.utime(model, ns=times)
        actual = [latent(server, graph_of(way, model.name, fsdp=fsdp)) for way in WAYS[:2]]
        server.free()  # ComfyUI's own loader does not look at the file
        expected = latent(server, graph_of("stock", model.name))
        assert max(difference(one, expected) for one in actual) <= 1e-4
