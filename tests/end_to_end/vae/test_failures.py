"""The drop-in VAE with bad files and inputs, with a rank that fails, without memory, and on a cancel."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import pytest
import torch
from safetensors.torch import load_file, save_file
from vae_nodes import DEMO, WORKERS, assert_same, decoded, latent, pictures, read

from raylight.cluster import active_session
from raylight.cluster.status import IDLE
from raylight.driver import api
from raylight.driver.remote_vae import RemoteVAE
from raylight.parallel.rows.row_tensor import RowsError

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes")

# -- bad input ------------------------------------------------------------------------------------------------------


def cut(folder: Path) -> Path:
    path = folder / "cut.safetensors"
    path.write_bytes(DEMO.read_bytes()[:-50_000])
    return path


def incomplete(folder: Path) -> Path:
    tensors = load_file(DEMO)
    del tensors["taesd_decoder.3.conv.0.weight"]
    save_file(tensors, folder / "incomplete.safetensors")
    return folder / "incomplete.safetensors"


def another_model(folder: Path) -> Path:
    save_file({"blocks.0.weight": torch.zeros(3)}, folder / "another.safetensors")
    return folder / "another.safetensors"


def text(folder: Path) -> Path:
    (folder / "text.safetensors").write_text("<html>404</html>" * 9)
    return folder / "text.safetensors"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (cut, "cut.safetensors cannot be loaded as a VAE: "),
        (incomplete, r"incomplete.safetensors cannot be loaded as a VAE: the tensor taesd_decoder.3.conv.0.weight is"),
        (another_model, r"another.safetensors cannot be loaded as a VAE: its tensors \(blocks.0.weight\) are not"),
        (text, "text.safetensors cannot be loaded as a VAE: "),
    ],
)
def test_rejects_files_in_the_loader(write: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(ValueError, match=message):
        api.load_vae(str(path), lambda: read(path), WORKERS)


def test_a_file_without_an_encoder(stock: comfy.sd.VAE, tmp_path: Path) -> None:
    path = tmp_path / "decoder.safetensors"
    save_file({name: one for name, one in load_file(DEMO).items() if "encoder" not in name}, path)
    vae, samples = api.load_vae(str(path), lambda: read(path), WORKERS), latent(1, 16, 5, 6)
    assert_same(decoded(vae, samples), decoded(stock, samples))
    with pytest.raises(ValueError, match="decoder.safetensors has no encoder: it can decode only"):
        vae.encode(pictures(1, 32, 32, 3))
    assert_same(decoded(vae, samples), decoded(stock, samples))


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 16, 8), (1, 16, 1, 1, 8, 8), (1, 48, 3, 8, 8)])
def test_rejects_latents_of_another_model(shape: tuple[int, ...], dropin: RemoteVAE) -> None:
    with pytest.raises(ValueError, match="it was made for another model. Choose the VAE of the model"):
        dropin.decode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(8, 8, 3), (1, 2, 8, 8, 3), (1, 4, 64, 3)])
def test_rejects_what_is_no_picture(shape: tuple[int, ...], dropin: RemoteVAE) -> None:
    with pytest.raises(ValueError, match="pictures|too small"):
        dropin.encode(torch.zeros(shape))


# -- failures -------------------------------------------------------------------------------------------------------


class Faulty:
    """Options of a job, in whose place a rank gets what a fault leaves: none."""

    def __init__(self, rank: int, what: str, mark: Path) -> None:
        self._call = rank, what, str(mark)

    def __reduce__(self) -> Any:
        return fail_once, self._call


def fail_once(rank: int, what: str, mark: str) -> dict[str, Any]:
    """Fail on a rank, the first time only, for which `mark` is written."""
    import os
    import signal

    import torch.distributed as dist

    if what == "rows":
        raise RowsError("the operation 'sort' cannot be followed by rows")
    if dist.get_rank() == rank and not os.path.exists(mark):
        open(mark, "w").close()
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise MemoryError("out of memory, by a test")
    return {}


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int, str], None]:
    """Call it with a rank and a fault for the next job."""
    import sys

    from ray.cloudpickle import cloudpickle

    from raylight.cluster import serialization
    from raylight.driver import vae_run

    def arrange(rank: int, what: str) -> None:
        def pack(content: Any, refer: Any) -> Any:
            cloudpickle.register_pickle_by_value(sys.modules[__name__])
            try:
                return serialization.pack((content[0], Faulty(rank, what, tmp_path / "mark")), refer)
            finally:
                cloudpickle.unregister_pickle_by_value(sys.modules[__name__])

        monkeypatch.setattr(vae_run, "pack", pack)

    return arrange


def test_what_cannot_be_followed_by_rows_is_done_in_comfyui(
    stock: comfy.sd.VAE, dropin: RemoteVAE, faulty: Callable[[int, str], None], caplog: pytest.LogCaptureFixture
) -> None:
    samples = latent(1, 16, 8, 8)
    decoded(dropin, samples)
    session = active_session.running()
    faulty(-1, "rows")
    with caplog.at_level(logging.INFO, "raylight"):
        assert torch.equal(decoded(dropin, samples), decoded(stock, samples))
    assert "as without workers: the operation 'sort' cannot be followed by rows" in caplog.text
    assert active_session.running() is session


def test_a_killed_rank_is_named_and_the_next_decode_works(
    stock: comfy.sd.VAE, dropin: RemoteVAE, faulty: Callable[[int, str], None]
) -> None:
    samples = latent(1, 16, 8, 8)
    decoded(dropin, samples)
    faulty(1, "kill")
    with pytest.raises(RuntimeError, match=r"rank 1 .* died while .*: its process"):
        decoded(dropin, samples)
    assert_same(decoded(dropin, samples), decoded(stock, samples))


def test_out_of_memory_is_tried_again_in_pieces(
    stock: comfy.sd.VAE, dropin: RemoteVAE, faulty: Callable[[int, str], None], caplog: pytest.LogCaptureFixture
) -> None:
    samples = latent(1, 16, 9, 128)
    faulty(1, "memory")
    with caplog.at_level(logging.INFO, "raylight"):
        actual = decoded(dropin, samples)
    assert "a worker ran out of memory with whole rows; new workers try again" in caplog.text
    assert "rows in 4 pieces of the width on 2 workers" in caplog.text
    expected = decoded(stock, samples)
    assert actual.shape == expected.shape
    assert ((actual - expected).norm() / (expected - expected.mean()).norm()).item() < 0.05  # at the seams


def test_a_cancel_ends_it_and_workers_stay(stock: comfy.sd.VAE, dropin: RemoteVAE) -> None:
    samples = latent(1, 16, 8, 8)
    decoded(dropin, samples)
    session = active_session.running()
    assert session is not None
    while set(session.phases.values()) != {IDLE}:  # of the decode before
        time.sleep(0.01)

    def cancel() -> None:
        while not any(phase.startswith("decoding") for phase in session.phases.values()):
            time.sleep(0.01)
        comfy.model_management.interrupt_current_processing()

    thread = threading.Thread(target=cancel)
    thread.start()
    began = time.monotonic()
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            decoded(dropin, latent(80, 16, 16, 16))
    finally:
        thread.join()
        comfy.model_management.interrupt_current_processing(False)  # else it would end the next test
    assert time.monotonic() - began < 20
    assert active_session.running() is session
    assert_same(decoded(dropin, samples), decoded(stock, samples))
