"""Attention of libraries: how they are called, and the errors when they cannot be.

The libraries need a GPU; fakes with their signatures are called here, and on a GPU each kernel tests itself when it is
chosen.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy import plain_kernel

from raylight.attention import kernels, library
from raylight.attention.library import LIBRARIES, Library, LibraryKernel, LibraryKernelWithLse

CPU = torch.device("cpu")


def by_definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with tensors (B, S, H, D), as the libraries do."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    lse = (q.float() @ k.float().transpose(-1, -2) * scale).logsumexp(-1)
    return plain_kernel(q, k, v, None, scale).transpose(1, 2), lse


STAND_IN = Library("torch", "", lambda: by_definition, head_sizes=(8,))


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).half()


@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize("masked", [False, True])
def test_layout_scale_groups_and_masks(scale: float | None, masked: bool) -> None:
    q, k, v = draw(2, 4, 7, 8), draw(2, 2, 11, 8), draw(2, 2, 11, 8)
    mask = draw(2, 1, 7, 11) if masked else None
    attention = LibraryKernelWithLse("FA", STAND_IN)
    expected = plain_kernel(q.float(), k.float(), v.float(), None if mask is None else mask.float(), scale)
    torch.testing.assert_close(attention(q, k, v, mask, scale).float(), expected, rtol=1e-2, atol=1e-2)
    out, total = attention.with_lse(q, k, v, mask, scale)
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)
    assert total.shape == (2, 4, 7)


@pytest.mark.parametrize(("keys", "by_library"), [(64, True), (96, False), (4096 + 7, True)])
def test_blocks_of_keys_that_are_padded_wrongly_are_not_left_to_a_library(keys: int, by_library: bool) -> None:
    called = []

    def function(*call: torch.Tensor) -> tuple[torch.Tensor, None]:
        called.append(True)
        return by_definition(*call)[0], None

    library = Library("torch", "", lambda: function, head_sizes=(8,), key_block=lambda: 64)
    attention = LibraryKernel("SAGE_AUTO", library)
    out = attention(draw(1, 1, 3, 8), draw(1, 1, keys, 8), draw(1, 1, keys, 8), None, None)
    assert out.shape == (1, 1, 3, 8)
    assert bool(called) == by_library


def test_refuses_a_dtype_and_a_head_size() -> None:
    attention = LibraryKernelWithLse("FA", STAND_IN)
    with pytest.raises(ValueError, match="FA computes in float16 or bfloat16, and this model in float32: choose auto"):
        attention(*(draw(1, 2, 3, 8).float() for _ in range(3)), None, None)
    with pytest.raises(ValueError, match="FA does not take attention heads of size 12"):
        attention(*(draw(1, 2, 3, 12) for _ in range(3)), None, None)


@pytest.mark.parametrize("name", LIBRARIES)
def test_says_what_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ValueError, match=f"XFuser_attention = {name}: the Python package .* is not installed: "):
        kernels.check_kernel(name)


@pytest.mark.parametrize("name", ["AITER", "FA3"])
def test_says_that_yunchang_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda module: None if module == "yunchang" else module)
    with pytest.raises(
        ValueError,
        match=f"{name}: it is called through the Python package yunchang, which is not "
        "installed: run pip install --no-deps yunchang; or choose auto",
    ):
        kernels.check_kernel(name)


def test_says_what_to_choose_instead() -> None:
    with pytest.raises(ValueError, match="SPARSE_SAGE needs parameters .*: choose one of auto, TORCH, TORCH_FLASH"):
        kernels.check_kernel("SPARSE_SAGE")
    with pytest.raises(ValueError, match="NONE is not known: choose one of auto"):
        kernels.check_kernel("NONE")


def test_says_that_a_gpu_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIBRARIES, "FA", STAND_IN)
    with pytest.raises(ValueError, match="FA cannot run here: it needs a GPU; choose auto"):
        kernels.check_kernel("FA", device=CPU)


def test_no_ring_without_a_log_sum_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIBRARIES, "FA", Library("torch", "", lambda: by_definition, has_lse=False))
    kernels.check_kernel("FA", ring_degree=1)
    with pytest.raises(ValueError, match="FA gives no log-sum-exp, so it cannot be used with ring_degree = 2"):
        kernels.check_kernel("FA", ring_degree=2)


def test_auto_on_a_cpu() -> None:
    assert kernels.kernel("auto", CPU).name == "TORCH"


def test_a_library_that_is_wrong_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        out, total = by_definition(q, k, v, scale)
        return out, torch.zeros_like(total)

    monkeypatch.setattr(Library, "unsupported", lambda self, device: None)
    monkeypatch.setitem(LIBRARIES, "FA", Library("torch", "", lambda: wrong))
    with pytest.raises(ValueError, match="FA does not work here: its error is"):
        kernels.kernel.__wrapped__("FA", CPU)


def test_a_library_that_lacks_what_it_needs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> library.Function:
        raise ModuleNotFoundError("No module named 'cutlass'")

    monkeypatch.setattr(Library, "unsupported", lambda self, device: None)
    monkeypatch.setitem(LIBRARIES, "FA4", Library("torch", "run pip install flash-attn-4", broken))
    with pytest.raises(ValueError, match="FA4: torch cannot be imported: No module named 'cutlass'; run pip install"):
        kernels.kernel.__wrapped__("FA4", CPU)


def test_calls_in_full_precision_are_left_to_pytorch() -> None:
    assert LibraryKernel("SAGE_AUTO", replace(STAND_IN, yields=True)).precise.name == "TORCH"
    kernel = LibraryKernel("FA", STAND_IN)
    assert kernel.precise is kernel


def test_names_the_version_that_has_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    older = replace(LIBRARIES["COMFY_KITCHEN_INT8"], attribute="a_function_of_later_versions")
    monkeypatch.setitem(LIBRARIES, "COMFY_KITCHEN_INT8", older)
    with pytest.raises(
        ValueError,
        match=r"COMFY_KITCHEN_INT8: comfy_kitchen 0\.\S+ is installed, which does not have it: "
        r"run pip install --upgrade 'comfy-kitchen>=0\.2\.31'; or choose auto",
    ):
        kernels.check_kernel("COMFY_KITCHEN_INT8")


def test_libraries_are_called_by_their_signatures(tmp_path: Path) -> None:
    """Packages with the signatures of flash-attn 2 and 4, FlashInfer and comfy-kitchen, computed by the definition."""
    package = tmp_path / "flash_attn"
    (package / "cute").mkdir(parents=True)
    (tmp_path / "flashinfer").mkdir()
    (package / "__init__.py").write_text("")
    (package / "flash_attn_interface.py").write_text(
        "from test_library import by_definition\n"
        "def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, return_attn_probs=False):\n"
        "    return *by_definition(q, k, v, softmax_scale), None\n"
    )
    (package / "cute" / "__init__.py").write_text(
        "from test_library import by_definition\n"
        "def flash_attn_func(q, k, v, softmax_scale=None, causal=False, return_lse=False):\n"
        "    return by_definition(q, k, v, softmax_scale)\n"
    )
    (tmp_path / "flashinfer" / "__init__.py").write_text(
        "import math\n"
        "from test_library import by_definition\n"
        "def single_prefill_with_kv_cache(q, k, v, sm_scale=None, return_lse=False):\n"
        "    out, lse = by_definition(q[None], k[None], v[None], sm_scale)\n"
        "    return out[0], lse[0].T / math.log(2)\n"
    )
    (tmp_path / "comfy_kitchen.py").write_text(
        "from test_library import by_definition\n"
        "def int8_attention(q, k, v, *, scale=None, attn_mask=None):\n"
        "    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1\n"
        "    return by_definition(*(t.transpose(1, 2) for t in (q, k, v)), scale)[0].transpose(1, 2)\n"
    )
    script = (
        "import torch\nfrom test_library import draw, plain_kernel\n"
        "from raylight.attention.library import LIBRARIES, LibraryKernel, LibraryKernelWithLse\n"
        "from raylight.attention.torch_kernels import reference_attention\n"
        "q, k, v = draw(2, 4, 7, 64), draw(2, 2, 11, 64), draw(2, 2, 11, 64)\n"
        "full = [t.float().repeat_interleave(4 // t.shape[1], 1) for t in (q, k, v)]\n"
        "expected, true_lse = reference_attention(*full, None, 0.2)\n"
        "for name in ('FA', 'FA4', 'FLASHINFER'):\n"
        "    assert LIBRARIES[name].missing() is None, name\n"
        "    out, lse = LibraryKernelWithLse(name, LIBRARIES[name]).with_lse(q, k, v, None, 0.2)\n"
        "    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2, msg=name)\n"
        "    torch.testing.assert_close(lse, true_lse, rtol=1e-2, atol=1e-2, msg=name)\n"
        "assert LIBRARIES['COMFY_KITCHEN_INT8'].missing() is None\n"
        "out = LibraryKernel('INT8', LIBRARIES['COMFY_KITCHEN_INT8'])(q, k, v, None, 0.2)\n"
        "torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)\n"
    )
    path = [str(tmp_path), str(Path(__file__).parent), *sys.path]
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"import sys; sys.path[:] = {path!r}\n{script}"], check=True, timeout=120
    )
