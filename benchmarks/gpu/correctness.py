"""Results on a GPU against stock ComfyUI there, for every way to parallelize.

All ranks use one GPU, over gloo, so one card is enough: all but NCCL's transport is as on several. The models have five
heads of 128, two blocks of each kind, and thousands of tokens.

    COMFYUI_PATH=/my/ComfyUI python benchmarks/gpu/correctness.py --json correctness.json

Figures are the relative L2 error against ComfyUI's result in the same dtype, the worst of all ranks. `rounding`, for
scale, is the error of ComfyUI's result in this dtype against float32. `LoRA` has two, one of them of every kind.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import traceback
from pathlib import Path
from typing import Any

import torch
from full_size import versions
from measure import relative
from torch import Tensor

from raylight.dev.local_ranks import run_ranks, values

HEADS = 5
WIDE = {
    "Wan T2V": ({"dim": 128 * HEADS, "ffn_dim": 1024, "num_heads": HEADS}, (1, 16, 7, 44, 60)),
    "Flux Dev": ({"hidden_size": 128 * HEADS, "num_heads": HEADS, "axes_dim": [16, 56, 56]}, (2, 16, 98, 94)),
    "Qwen Image": (
        {"attention_head_dim": 128, "num_attention_heads": HEADS, "axes_dims_rope": (16, 56, 56)},
        (1, 16, 1, 136, 142),
    ),
    "Hunyuan Video": ({"hidden_size": 128 * HEADS, "num_heads": HEADS, "axes_dim": [16, 56, 56]}, (1, 16, 7, 44, 60)),
}
FORMS = {"bf16": (torch.bfloat16, None), "fp16": (torch.float16, None), "fp8": (torch.float8_e4m3fn, torch.bfloat16)}
LARGEST = 1e-2


@dataclasses.dataclass(frozen=True)
class Way:
    """How ranks parallelize. `degrees` are those of ring and Ulysses, both 1 if tokens are not split."""

    name: str
    degrees: tuple[int, int] = (1, 1)
    shards: bool = False
    offload: bool = False
    patched: bool = False


def ways(world: int) -> list[Way]:
    """Return what is compared on `world` ranks."""
    if world == 1:
        return []
    usp = (1, world)
    found = [
        Way("Ulysses", usp),
        Way("ring", (world, 1)),
        Way("FSDP", shards=True),
        Way("Ulysses + FSDP", usp, True),
        Way("Ulysses + FSDP offloaded", usp, True, True),
        Way("Ulysses + FSDP, LoRA", usp, True, False, True),
        Way("Ulysses, LoRA", usp, patched=True),
    ]
    if world % 2 == 0 and world > 2:
        found.insert(2, Way("Ulysses x ring", (2, world // 2)))
    return found


def setup(device_type: str) -> torch.device:
    """Return this rank's device, after a first call of ComfyUI's attention: on Hopper cuDNN computes the first call,
    whatever ComfyUI asks for, and no other.
    """
    import comfy.ops

    device = torch.device(device_type, 0) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    q = torch.randn(1, 1, 128, 128, device=device, dtype=torch.bfloat16)
    comfy.ops.scaled_dot_product_attention(q, q, q)
    return device


def family_of(name: str) -> Any:
    from raylight.dev.zoo import families

    family = families()[name]
    return dataclasses.replace(family, unet_config={**family.unet_config, **WIDE[name][0]})


def inputs(family: Any, device: torch.device, small: bool) -> dict[str, Tensor]:
    from raylight.dev.zoo.family import Draw

    given = next(iter(family.calls.values()))(Draw(3))
    if not small:
        given["x"] = Draw(2)(*WIDE[family.name][1])
    return {key: value.to(device) for key, value in given.items()}


def stock(
    family: Any,
    form: str,
    given: dict[str, Tensor],
    device: torch.device,
    patched: bool = False,
    options: dict[str, Any] | None = None,
) -> Tensor:
    """Return ComfyUI's result: its own, or with attention replaced by `options`."""
    import comfy.model_patcher
    import comfy.sd

    dtype, computes_in = FORMS.get(form, (torch.float32, None))
    model = family.build(dtype=dtype, computes_in=computes_in)
    patcher = comfy.model_patcher.ModelPatcher(model, device, torch.device("cpu"))
    for tensors, strength in loras(shapes_of(model)) if patched else ():
        patcher, _ = comfy.sd.load_lora_for_models(patcher, None, dict(tensors), strength, 0)
    patcher.patch_model(device)
    return patcher.model.apply_model(**given, transformer_options=options or {}).float()


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def loras(shapes: dict[str, tuple[int, ...]]) -> tuple[tuple[dict[str, Tensor], float], ...]:
    """Return two LoRAs with strengths, one of them with layers of every kind, for weights of these shapes."""
    from loras import KINDS, lora_for

    # ComfyUI's BOFT wants float32, in which it patches on GPUs without fast float16 only.
    return (lora_for(shapes, ["lora"], 1), 0.8), (lora_for(shapes, [k for k in KINDS if k != "boft"], 2), -0.6)


def parallel(family: Any, form: str, way: Way, given: dict[str, Tensor], device: torch.device, world: int) -> Tensor:
    """Return this rank's result."""
    import comfy.lora
    from staged_ring import StagedThroughCpuHybrid

    from raylight.attention.kernels import kernel
    from raylight.host.checkpoint import MappedModel
    from raylight.parallel.mesh import MeshShape, build_mesh, world_axis
    from raylight.plans import plan_for
    from raylight.worker import lora
    from raylight.worker.patcher import RankPatcher
    from raylight.worker.sequence_parallel import apply_sequence_parallel
    from raylight.worker.sharded_patcher import build_sharded

    ring, ulysses = way.degrees
    mesh = build_mesh(MeshShape(world // (ring * ulysses), ring, ulysses), device)
    dtype, computes_in = FORMS[form]
    model = family.build(dtype=dtype, computes_in=computes_in)
    shapes = shapes_of(model)
    mapped = MappedModel(model, {}, device, comfy.lora.model_lora_keys_unet(model, {}), shapes)
    patches = loras(shapes) if way.patched else ()
    options: dict[str, Any] = {"transformer_options": {}}
    if ring * ulysses > 1:
        strategy = StagedThroughCpuHybrid(mesh.get_group("ulysses"), mesh.get_group("ring"))
        split = apply_sequence_parallel(model.diffusion_model, plan_for(model.diffusion_model), mesh, strategy)
        split.install(options, kernel("auto", device))
    if way.shards:
        patcher, _ = build_sharded(mapped, world_axis(mesh), way.offload)
    else:
        patcher = RankPatcher(model, device, torch.device("cpu"))
    patcher = patcher.clone()
    for index, (tensors, strength) in enumerate(patches):
        fitted = lora.fit_lora(f"LoRA {index}", tensors, mapped.lora_keys, lora.WeightShapes(shapes))
        patcher.add_patches(fitted.patches, strength)
    if way.shards:
        patcher.load(device)
    else:
        patcher.patch_model(device)
    return model.apply_model(**given, transformer_options=options["transformer_options"]).float()


def compare(
    rank: int, world: int, device_type: str, names: tuple[str, ...], forms: tuple[str, ...], small: bool
) -> dict[str, float | str]:
    """Compare every way on `world` ranks."""
    device = setup(device_type)
    results: dict[str, float | str] = {}
    for name in names:
        family = family_of(name)
        given = inputs(family, device, small)
        for form in forms:
            with torch.no_grad():
                expected = {False: stock(family, form, given, device)}
                for way in ways(world):
                    key = f"{name}, {form}, {world} ranks, {way.name}"
                    try:
                        if way.patched not in expected:
                            expected[way.patched] = stock(family, form, given, device, patched=True)
                        result = parallel(family, form, way, given, device, world)
                        results[key] = relative(result, expected[way.patched])
                    except Exception:  # ranks fail alike, and the next way can still be compared
                        results[key] = traceback.format_exc()
    return results


def compare_alone(
    rank: int, world: int, device_type: str, names: tuple[str, ...], forms: tuple[str, ...], small: bool
) -> dict[str, float | str]:
    """Compare every attention backend on one rank."""
    from raylight.attention.kernels import NAMES, kernel
    from raylight.worker import transformer_options

    device = setup(device_type)
    results: dict[str, float | str] = {}
    for name in names:
        family = family_of(name)
        given = inputs(family, device, small)
        with torch.no_grad():
            exact = stock(family, "float32", given, device)
            for form in forms:
                expected = stock(family, form, given, device)
                results[f"{name}, {form}, rounding"] = relative(expected, exact)
                for backend in NAMES:
                    key = f"{name}, {form}, {backend}"
                    options: dict[str, Any] = {}
                    try:
                        transformer_options.install_override(
                            options, lambda own, *rest: own(*rest), kernel(backend, device)
                        )
                        results[key] = relative(
                            stock(family, form, given, device, options=options["transformer_options"]), expected
                        )
                    except ValueError as reason:
                        results[key] = f"refused: {reason}"
                    except Exception:
                        results[key] = traceback.format_exc()
    return results


def worst(ranks: list[dict[str, float | str]]) -> dict[str, float | str]:
    """Return the largest error of all ranks, or a failure."""
    found: dict[str, float | str] = {}
    for key in ranks[0]:
        failures = [rank[key] for rank in ranks if isinstance(rank[key], str)]
        found[key] = failures[0] if failures else max(rank[key] for rank in ranks)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--families", nargs="+", default=list(WIDE), choices=WIDE)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="the few tokens of the parity tests")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures: dict[str, Any] = {"versions": versions()}
    print(figures["versions"])
    failed = []
    for world in options.ranks:
        function = compare_alone if world == 1 else compare
        found = worst(
            values(
                run_ranks(
                    world,
                    function,
                    options.device,
                    tuple(options.families),
                    tuple(options.forms),
                    options.small,
                    timeout_s=900,
                )
            )
        )
        figures |= found
        for key, error in found.items():
            if isinstance(error, str):
                print(f"{key:<66} {error.splitlines()[-1] if 'refused' not in error else error[:90]}", flush=True)
                if "refused" not in error:
                    failed.append(f"{key}\n{error}")
            else:
                exact = "SAGE" not in key and "rounding" not in key
                over = exact and error > LARGEST
                print(f"{key:<66} {error:8.1e}{'  over ' + format(LARGEST, 'g') if over else ''}", flush=True)
                failed += [f"{key} {error:.1e}"] if over else []
    print(f"\n{len(failed)} failed or over {LARGEST:g} (quantised attention is not counted)")
    print("\n".join(failed))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
