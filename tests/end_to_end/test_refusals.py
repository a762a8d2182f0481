"""What workers refuse, and that they stay usable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comfy_cases import CASES, ParityCase, checkpoint, sample_on_workers, sample_stock
from quantised import OLD_SCALED_FP8, quantise
from safetensors.torch import load_file, save_file

from raylight.cluster import active_session
from raylight.cluster.config import SessionConfig
from raylight.driver import api
from raylight.host.recipe import REPLICATED, SHARDED, ModelRecipe, RayModel, WorkerConfig
from raylight.parallel.mesh import MeshShape

WORKERS = WorkerConfig(SessionConfig(MeshShape(ulysses=2), "cpu"), "TORCH")


def model_of(path: Path, sharding: str = REPLICATED) -> RayModel:
    return RayModel(WORKERS, ModelRecipe.of(str(path), "default", sharding))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    """What ComfyUI makes of a good model."""
    return sample_stock(checkpoint(folder, CASES["Flux"]), CASES["Flux"])


@pytest.fixture(autouse=True)
def session_survives(folder: Path, expected: torch.Tensor):
    """After each refusal the same workers sample a good model."""
    case = CASES["Flux"]
    good = checkpoint(folder, case)
    api.load(model_of(good))
    before = dict(active_session.session(WORKERS.config, None).places)
    yield
    assert torch.allclose(sample_on_workers(model_of(good), case), expected, atol=1e-4)
    assert active_session.session(WORKERS.config, None).places == before


def test_rejects_a_truncated_file(folder: Path) -> None:
    content = checkpoint(folder, CASES["Wan T2V"]).read_bytes()
    path = folder / "truncated.safetensors"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"truncated\.safetensors cannot be loaded"):
        api.load(model_of(path))


def test_rejects_a_truncated_file_whose_weights_are_to_be_split(folder: Path) -> None:
    content = checkpoint(folder, CASES["Wan T2V"]).read_bytes()
    path = folder / "cut.safetensors"
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"cut\.safetensors cannot be loaded"):
        api.load(model_of(path, SHARDED))


@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
def test_rejects_a_file_that_lacks_a_tensor(folder: Path, sharding: str) -> None:
    path = folder / "lacking.safetensors"
    tensors = load_file(checkpoint(folder, CASES["Wan T2V"]))
    del tensors["blocks.1.ffn.2.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"lacking\.safetensors .* the tensor blocks\.1\.ffn\.2\.weight is missing"):
        api.load(model_of(path, sharding))


def test_rejects_a_tensor_of_another_shape(folder: Path) -> None:
    path = folder / "misshapen.safetensors"
    tensors = load_file(checkpoint(folder, CASES["Wan T2V"]))
    tensors["blocks.1.ffn.2.weight"] = torch.zeros(3, 5)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"(?s)misshapen\.safetensors .*blocks\.1\.ffn\.2\.weight"):
        api.load(model_of(path, SHARDED))


@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
def test_rejects_a_file_of_which_most_has_no_place(folder: Path, sharding: str) -> None:
    path = folder / "excessive.safetensors"
    tensors = load_file(checkpoint(folder, CASES["Wan T2V"]))
    save_file(tensors | {"third": torch.zeros(1 + sum(tensor.numel() for tensor in tensors.values()))}, path)
    with pytest.raises(ValueError, match=r"excessive\.safetensors .* most of it \(50%, in 1 tensors: third\) has no"):
        api.load(model_of(path, sharding))


def test_rejects_a_quantised_layer_without_its_weight(folder: Path) -> None:
    path = folder / "scales.safetensors"
    quantise(checkpoint(folder, CASES["Wan T2V"]), path, OLD_SCALED_FP8)
    tensors = load_file(path)
    del tensors["blocks.0.ffn.0.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"scales\.safetensors .* blocks\.0\.ffn\.0\.weight is missing"):
        api.load(model_of(path, SHARDED))


class _Payload:
    def __init__(self, witness: Path) -> None:
        self._witness = witness

    def __reduce__(self) -> tuple:
        return Path.touch, (self._witness,)


def test_a_pickle_runs_nothing(folder: Path) -> None:
    path, witness = folder / "pickled.pt", folder / "witness"
    torch.save({"blocks.0.weight": _Payload(witness)}, path)
    with pytest.raises(ValueError, match=r"pickled\.pt cannot be loaded"):
        api.load(model_of(path))
    assert not witness.exists()


def test_rejects_a_file_of_something_else(folder: Path) -> None:
    path = folder / "something.safetensors"
    save_file({"weight": torch.zeros(3, 3)}, path)
    with pytest.raises(ValueError, match=r"something\.safetensors cannot be loaded as a diffusion model"):
        api.load(model_of(path))


@pytest.mark.parametrize("sharding", [REPLICATED, SHARDED])
def test_a_model_without_a_plan_is_no_refusal(folder: Path, sharding: str) -> None:
    path = folder / "autoregressive.safetensors"
    metadata = {"config": json.dumps({"transformer": {"causal_ar": True}})}
    save_file(load_file(checkpoint(folder, CASES["Wan T2V"])), path, metadata=metadata)
    case = CASES["Wan T2V"]
    actual, expected = sample_on_workers(model_of(path, sharding), case), sample_stock(path, case)
    assert (actual - expected).abs().max() <= 1e-4 * expected.std()


def test_rejects_more_workers_than_heads(folder: Path) -> None:
    narrow = ParityCase("wan-t2v", (1, 16, 1, 8, 8), 4096, heads=1)
    with pytest.raises(ValueError, match="WanModel has 1 attention heads, too few for ulysses_degree = 2"):
        api.load(model_of(checkpoint(folder, narrow)))


def test_fewer_tokens_than_workers_are_no_refusal(folder: Path) -> None:
    tiny = ParityCase("wan-t2v", (1, 16, 1, 2, 2), 4096)
    path = checkpoint(folder, tiny)
    actual, expected = sample_on_workers(model_of(path), tiny), sample_stock(path, tiny)
    assert (actual - expected).abs().max() <= 1e-4 * expected.std()


def test_a_file_that_vanishes_after_loading_is_named(folder: Path) -> None:
    path = folder / "gone.safetensors"
    path.write_bytes(checkpoint(folder, CASES["Flux"]).read_bytes())
    model = model_of(path)
    path.unlink()
    with pytest.raises(ValueError, match=r"gone\.safetensors is not there"):
        api.load(model)
