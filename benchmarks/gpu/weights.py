"""Sharded weights on a GPU against stock ComfyUI there: every format, with and without offload and LoRAs.

All ranks use one GPU, over gloo, so one card is enough; times mean nothing then, and are not printed.

    COMFYUI_PATH=/my/ComfyUI python benchmarks/gpu/weights.py --ranks 1 2 --json weights.json

The model is Wan with eight heads. `plain`, `LoRA`: relative L2 to ComfyUI's result, without LoRAs and with two of them,
of every kind; `effect`: how much they change it. `removed`, `moved`: the result is bitwise what it was, after the LoRAs
are removed, and after the weights went to the CPU and back. `share`: of the weights, on each rank. The memory is that
of blocks of Wan 14B; gloo, unlike NCCL, uses one block of it for a copy.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from correctness import loras, shapes_of
from full_size import write_checkpoint
from measure import relative
from torch import Tensor

from raylight.dev.local_ranks import run_ranks, values

HEADS = 8
LARGE_LAYERS = 6


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "x": torch.randn(1, 16, 3, 30, 26, generator=generator).cuda(),
        "t": torch.tensor([0.7]).cuda(),
        "c_crossattn": torch.randn(1, 21, 4096, generator=generator).cuda(),
    }


def compare(rank: int, world: int, paths: dict[str, Path], offload: bool) -> dict[str, dict[str, Any]]:
    """Compare each checkpoint, sharded over `world` ranks of one GPU."""
    import comfy.model_management
    import comfy.sd

    from raylight.host.checkpoint import load_mapped
    from raylight.parallel.mesh import MeshShape, build_mesh, world_axis
    from raylight.worker import lora
    from raylight.worker.sharded_patcher import build_sharded

    torch.cuda.set_device(0)
    device = torch.device("cuda", 0)
    mesh = world_axis(build_mesh(MeshShape(batch=world), device))
    results = {}
    for form, path in paths.items():
        with torch.inference_mode():
            stock = comfy.sd.load_diffusion_model(str(path))
            comfy.model_management.load_models_gpu([stock])
            try:
                expected = stock.model.apply_model(**inputs()).float()
            except (ValueError, RuntimeError) as error:  # a kernel that this GPU or PyTorch does not have
                results[form] = {"refused": str(error).splitlines()[0]}
                continue
            patches = loras(shapes_of(stock.model))
            for tensors, strength in patches:
                stock, _ = comfy.sd.load_lora_for_models(stock, None, dict(tensors), strength, 0)
            comfy.model_management.load_models_gpu([stock])
            expected_patched = stock.model.apply_model(**inputs()).float()
            comfy.model_management.unload_all_models()
            del stock
        with torch.no_grad():
            mapped = load_mapped(str(path), {})
            patcher, report = build_sharded(mapped, mesh, offload)
            first = patcher.model.apply_model(**inputs()).float()
            patched = patcher.clone()
            for index, (tensors, strength) in enumerate(patches):
                fitted = lora.fit_lora(f"LoRA {index}", tensors, mapped.lora_keys, lora.WeightShapes(mapped.shapes))
                patched.add_patches(fitted.patches, strength)
            patched.load(device)
            of_patched = patched.model.apply_model(**inputs()).float()
            patcher.load(device)
            removed = patcher.model.apply_model(**inputs()).float()
            patcher.unpatch_model(torch.device("cpu"))
            patcher.load(device)
            moved = patcher.model.apply_model(**inputs()).float()
        results[form] = {
            "plain": relative(first, expected),
            "lora": relative(of_patched, expected_patched),
            "effect": relative(expected_patched, expected),
            "removed": torch.equal(removed, first),
            "moved": torch.equal(moved, first),
            "share": report.bytes / report.model_bytes,
        }
        del patcher, patched, mapped
    return results


def peak(rank: int, world: int, path: Path, offload: bool) -> dict[str, float]:
    """Return one rank's GPU memory with blocks of Wan 14B, in blocks: between forwards, and the peak beyond that."""
    from raylight.host.checkpoint import load_mapped
    from raylight.parallel.mesh import MeshShape, build_mesh, world_axis
    from raylight.worker.sharded_patcher import build_sharded

    torch.cuda.set_device(0)
    mesh = world_axis(build_mesh(MeshShape(batch=world), torch.device("cuda", 0)))
    with torch.no_grad():
        patcher, _ = build_sharded(load_mapped(str(path), {}), mesh, offload)
        block = sum(p.numel() * p.element_size() for p in patcher.model.diffusion_model.blocks[0].parameters())
        patcher.model.apply_model(**inputs())
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        patcher.model.apply_model(**inputs())
        return {"between": before / block, "more": (torch.cuda.max_memory_allocated() - before) / block}


def _write(folder: Path) -> dict[str, Path]:
    from quantised import FORMATS, quantise
    from safetensors.torch import load_file, save_file

    from raylight.dev.demo import tiny

    source = folder / "float32.safetensors"
    tiny.write_checkpoint(source, "wan-t2v", heads=HEADS, layers=3)
    paths = {form: folder / f"{index}.safetensors" for index, form in enumerate(("bf16", "fp8", *FORMATS))}
    tensors = load_file(source)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, paths["bf16"])
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}, paths["fp8"])
    for form in FORMATS:
        quantise(source, paths[form], form)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--forms", nargs="*", help="only these formats, or none but the memory")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        paths = {
            form: path
            for form, path in _write(Path(temporary)).items()
            if options.forms is None or form in options.forms
        }
        large = Path(temporary) / "large.safetensors"
        write_checkpoint("wan-480p", large, torch.device("cuda"), LARGE_LAYERS)
        for world in options.ranks:
            for offload in (False, True):
                setup = f"{world} rank{'s' * (world > 1)}{', offloaded' * offload}"
                forms = values(run_ranks(world, compare, paths, offload, timeout_s=400))
                memory = values(run_ranks(world, peak, large, offload, timeout_s=200))[0]
                print(
                    f"\n{setup}: {memory['between']:.2f} blocks on the GPU between forwards, {memory['more']:.2f} "
                    f"more in one"
                )
                print(f"{'':<20} {'plain':>8} {'LoRA':>8} {'effect':>8} {'removed':>8} {'moved':>6} {'share':>6}")
                for form in paths:
                    ranks = [rank[form] for rank in forms]
                    if "refused" in ranks[0]:
                        print(f"{form:<20} not run by ComfyUI itself here: {ranks[0]['refused']}")
                        continue
                    worst = {key: max(rank[key] for rank in ranks) for key in ("plain", "lora", "effect", "share")}
                    exact = {key: all(rank[key] for rank in ranks) for key in ("removed", "moved")}
                    print(
                        f"{form:<20} {worst['plain']:8.1e} {worst['lora']:8.1e} {worst['effect']:8.1e} "
                        f"{exact['removed']!s:>8} {exact['moved']!s:>6} {worst['share']:6.3f}"
                    )
                    figures[f"{setup}, {form}"] = worst | exact | memory
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
