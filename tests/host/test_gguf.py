"""GGUF files, replicated and sharded, against ComfyUI with the layers of the pack that reads them."""

from __future__ import annotations

import gguf
import pytest
import torch
from gguf_cases import Compared, compare_gguf
from gguf_files import PACK, gathered_bytes, quantised_bytes, write_gguf
from safetensors.torch import load_file, save_file

from raylight.dev.demo.tiny import write_checkpoint
from raylight.dev.local_ranks import run_ranks, values
from raylight.host.gguf import GgmlTensors, open_pack, plain
from raylight.sharding import subclass_weights

CASES = {
    (2, "Q8_0", "F16"): ("replicated", "sharded"),
    # A convolution over time in BF16, which no layer of the pack unpacks.
    (3, "Q4_0", "BF16"): ("replicated", "sharded", "offloaded"),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], tuple[list[Compared], int, int]]:
    folder = tmp_path_factory.mktemp("gguf")
    source = folder / "plain.safetensors"
    write_checkpoint(source, "wan-t2v", heads=2, layers=1)
    save_file({name: tensor.bfloat16().float() for name, tensor in load_file(source).items()}, source)
    convolution = load_file(source)["patch_embedding.weight"]
    results = {}
    for (world, kind, rest), modes in CASES.items():
        path = like = folder / f"{kind}.gguf"
        write_gguf(source, path, kind, "wan", rest=rest)
        if rest == "BF16":
            like = folder / "like.gguf"
            write_gguf(source, like, kind, "wan", rest="F32")
        ranks = values(run_ranks(world, compare_gguf, path, modes, like, timeout_s=300))
        for mode in modes:
            stored = gathered_bytes(path, world)
            # The convolution is gathered in float32, not in 16 bits.
            stored += world * -(-convolution.shape[0] // world) * convolution[0].nbytes // 2
            results[world, mode] = [rank[mode] for rank in ranks], quantised_bytes(path), stored
    return results


@pytest.mark.parametrize(("world", "mode"), [(case[0], mode) for case, modes in CASES.items() for mode in modes])
def test_equals_comfyui(world: int, mode: str, measured, report_parity) -> None:
    ranks, full, stored = measured[world, mode]
    report_parity(
        f"Wan T2V, GGUF, {mode:<10} {world} ranks   max error {max(rank.error for rank in ranks):.1e}, with "
        f"two LoRAs {max(rank.patched for rank in ranks):.1e} of the standard deviation"
    )
    for rank in ranks:
        assert rank.error == 0.0
        assert rank.patched <= 1e-4
        assert rank.effect > 0.1
        assert rank.changed == rank.removed == rank.back == rank.in_parts == 0.0
        # Replicated weights are in the file, but for a convolution that the model needs in its own dtype.
        assert rank.own <= (0.05 * full if mode == "replicated" else 1.1 * full / world)
        assert rank.gathered == (0 if mode == "replicated" else stored)


def test_a_convolution_is_flattened_and_rebuilt() -> None:
    pack = open_pack(PACK)
    ggml = GgmlTensors(pack)
    values = torch.randn(6, 8, 2, 2, generator=torch.Generator().manual_seed(1))
    kind = gguf.GGMLQuantizationType.Q8_0
    stored = torch.from_numpy(gguf.quants.quantize(values.flatten(1).numpy(), kind))
    layer = pack.operations.Conv2d(8, 6, 2, bias=False)
    layer.weight = torch.nn.Parameter(
        pack.tensor(stored, tensor_type=kind, tensor_shape=values.shape), requires_grad=False
    )
    inputs = torch.ones(1, 8, 5, 5)
    expected = layer(inputs)
    subclass_weights.flatten_weights(layer, ggml.flatten)
    assert {name: tuple(one.shape) for name, one in layer.named_parameters()} == {"weight_raw": (6, 34)}
    assert layer.weight.shape == values.shape
    assert torch.equal(plain(layer.weight), stored)
    assert torch.equal(layer(inputs), expected)


def test_a_tensor_of_the_same_bytes_moves_alone() -> None:
    pack = open_pack(PACK)
    ggml = GgmlTensors(pack)
    weight = pack.tensor(
        torch.zeros(2, 34, dtype=torch.uint8),
        tensor_type=gguf.GGMLQuantizationType.Q8_0,
        tensor_shape=torch.Size((2, 32)),
    )
    other = ggml.with_patches(weight, [([], "name")])
    assert plain(other).data_ptr() == plain(weight).data_ptr()
    assert (other.patches, weight.patches) == ([([], "name")], [])
    other.data = torch.ones(2, 34, dtype=torch.uint8)
    assert plain(weight).sum() == 0
