"""Weights from a file to GPUs: system memory does not grow with the file, and values are those of ComfyUI."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from gpu_cases import GPUS, HEADS, WAYS, WORKERS, latent, on_workers
from safetensors.torch import load_file, save_file
from torch import Tensor

from raylight.cluster import active_session
from raylight.dev.demo.tiny import write_checkpoint
from raylight.driver import api
from raylight.host.recipe import OFFLOADED, REPLICATED, ModelRecipe, RayModel
from raylight.sharding import staged_read
from raylight.sharding.file_weight import FileWeight
from raylight.sharding.pinned import PinnedBuffer

GPU = torch.device("cuda", 0)
MIB = 1 << 20
SLACK = 48 * MIB  # of a process that has run a small model before
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
LOADS = {
    "bf16 to fp16": (torch.bfloat16, "fp16", torch.float16),
    "fp32 to bf16": (torch.float32, "bf16", torch.bfloat16),
    "bf16 to fp8": (torch.bfloat16, "fp8_e4m3fn", torch.float8_e4m3fn),
}


@pytest.fixture(scope="module")
def parameters(folder: Path) -> int:
    """The size of a model of a few hundred million parameters, of which `file_of` has the files."""
    heads = 2 * HEADS
    layers = -(-300_000_000 // (12 * (128 * heads) ** 2))
    write_checkpoint(folder / "large-float32.safetensors", "wan-t2v", heads=heads, layers=layers)
    tensors = load_file(folder / "large-float32.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "large-bfloat16.safetensors")
    return sum(tensor.numel() for tensor in tensors.values())


def file_of(folder: Path, dtype: torch.dtype) -> Path:
    return folder / f"large-{str(dtype).removeprefix('torch.')}.safetensors"


@pytest.mark.parametrize("sharding", WAYS)
@pytest.mark.parametrize("load", LOADS)
def test_no_rank_has_a_copy_in_system_memory(
    load: str, sharding: str, folder: Path, parameters: int, path: Path, compare, report_parity: Callable[[str], None]
) -> None:
    stored, weight_dtype, dtype = LOADS[load]
    latent(on_workers(path, sharding))  # what a process takes for the first run of any model
    before = own_memory()
    file = file_of(folder, stored)
    workers = replace(WORKERS, sharding=sharding, free_memory_after=True)
    model = api.load(RayModel(workers, ModelRecipe.of(str(file), weight_dtype, sharding)))
    stock: ModelPatcher = comfy.sd.load_diffusion_model(str(file), model_options={"dtype": dtype})
    expected = latent(stock)
    held = parameters * dtype.itemsize // (1 if sharding == REPLICATED else GPUS)
    allowed = (1.1 if sharding == OFFLOADED else 0.2) * held + SLACK
    for what in ("first run", "after it has left the GPU and come back", "once more"):
        compare(latent(model), expected, what, 3e-2)  # each ends with the model in the file
        grown = [now - then for now, then in zip(own_memory(), before, strict=True)]
        report_parity(f"{load}, {sharding}, {what}: grown by {max(grown) / held:.2f} of what a rank holds")
        assert max(grown) <= allowed, what


def own_memory() -> list[int]:
    """The bytes of each worker that are of no file: anonymous, pinned ones among them, and shared."""
    found = []
    session = active_session.running()
    assert session is not None
    for place in session.places.values():
        lines = Path(f"/proc/{place.pid}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        found.append(sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem")))
    return found


def patterns(dtype: torch.dtype) -> Tensor:
    """Every value of a dtype of 8 or 16 bits; of float32 those of all others, their neighbours, and random bits."""
    if dtype.itemsize == 1:
        return torch.arange(256).to(torch.uint8).view(dtype)
    if dtype.itemsize == 2:
        return torch.arange(65536).to(torch.uint16).view(dtype)
    exact = torch.cat([patterns(one).float() for one in DTYPES if one.itemsize < 4]).view(torch.int32)
    halves = torch.cat([exact + step for step in (0x800, 0x1000, 0x8000, 0x80000, 0x100000)])
    random = torch.randint(-(2**31), 2**31, (1 << 22,), generator=torch.Generator().manual_seed(0))
    return torch.cat([exact, exact - 1, exact + 1, halves, halves - 1, halves + 1, random.int()]).view(torch.float32)


@pytest.mark.parametrize("own", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_every_value_is_converted_as_on_the_cpu(stored: torch.dtype, own: torch.dtype) -> None:
    in_file = patterns(stored)
    wanted = torch.empty(in_file.shape, dtype=own).copy_(in_file)
    assert same_bits(FileWeight.of(in_file, own).to(GPU).cpu(), wanted)
    for then in DTYPES:  # cast on use, by way of its own dtype
        assert same_bits(FileWeight.of(in_file, own).to(GPU, then).cpu(), wanted.to(then)), then


def same_bits(actual: Tensor, wanted: Tensor) -> bool:
    """Whether they are the same to the last bit, but for which NaN it is, in which CPUs differ too."""
    number = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[wanted.itemsize]
    nan = wanted.float().isnan()
    equal = (actual.view(number) == wanted.view(number)) | nan
    return actual.dtype == wanted.dtype and bool((actual.float().isnan() == nan).all()) and bool(equal.all())


@pytest.mark.parametrize("offset", [0, 3])
def test_what_is_read_is_what_the_file_has(offset: int) -> None:
    sizes = [1, 1000, MIB - 1, 5 * MIB + 3, 40 * MIB, 7, 16 * MIB, 0] * 4
    memory = torch.randint(0, 256, (sum(sizes) + offset,), dtype=torch.uint8)
    sources = memory[offset:].split(sizes)
    for _ in range(2):
        found = [FileWeight.of(source, source.dtype).to(GPU) for source in sources]
        assert all(torch.equal(one.cpu(), source) for one, source in zip(found, sources, strict=True))
        staged_read.release()


def test_a_read_waits_for_what_used_the_memory_before() -> None:
    source = torch.ones(64 * MIB, dtype=torch.uint8)
    destination = torch.zeros(64 * MIB, dtype=torch.uint8, device=GPU)
    for _ in range(8):
        torch.cuda._sleep(50_000_000)
        destination.fill_(7)
        staged_read.copy_weight(source, destination)
        assert int(destination.sum(dtype=torch.int64)) == 64 * MIB


def test_a_view_with_gaps_can_be_read_into() -> None:
    source = torch.randn(300, 20)
    destination = torch.zeros(300, 40, device=GPU, dtype=torch.float16)
    staged_read.copy_weight(source, destination[:, ::2], (torch.bfloat16,))
    assert torch.equal(destination[:, ::2].cpu(), source.bfloat16().half())
    assert not destination[:, 1::2].any()


def test_pinned_memory_is_pinned_for_as_long_as_it_is_used() -> None:
    like = torch.empty(3, 5 * MIB, dtype=torch.float16)
    taken = PinnedBuffer([like.nbytes]).take(like)
    assert taken.is_pinned()
    values = torch.randn(like.shape).half()
    taken.copy_(values.to(GPU), non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(taken.to(GPU, non_blocking=True).cpu(), values)
    del taken
    gc.collect()
    again = PinnedBuffer([like.nbytes]).take(like)
    assert again.is_pinned()
