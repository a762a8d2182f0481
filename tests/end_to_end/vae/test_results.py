"""The drop-in VAE in ComfyUI's own nodes, against ComfyUI's VAE: same inputs, float32, on the CPU."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import comfy.ldm.modules.diffusionmodules.model as model_code
import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.taesd.taesd import TAESD
from torch import Tensor
from vae_files import write_vae
from vae_nodes import DEMO, WORKERS, assert_same, decoded, latent, pictures, read

import nodes as comfy_nodes
from raylight.cluster import active_session
from raylight.dev.demo.tiny import write_checkpoint
from raylight.driver import api, vae_import
from raylight.driver.remote_vae import RemoteVAE
from raylight.host import foreign_code
from raylight.host.recipe import ModelRecipe, RayModel
from raylight.host.worker_service import WorkerService

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes")


@pytest.mark.smoke
def test_it_is_a_vae_of_comfyui(stock: comfy.sd.VAE, dropin: RemoteVAE) -> None:
    assert isinstance(dropin, comfy.sd.VAE)
    assert dropin.spacial_compression_decode() == stock.spacial_compression_decode()
    assert dropin.get_sd().keys() == stock.get_sd().keys()
    assert type(dropin.first_stage_model) is type(stock.first_stage_model)


@pytest.mark.smoke
@pytest.mark.parametrize("shape", [(1, 16, 12, 14), (3, 16, 11, 9), (1, 16, 1, 2), (2, 16, 3, 7, 5)])
def test_decodes_as_comfyui(shape: tuple[int, ...], stock: comfy.sd.VAE, dropin: RemoteVAE) -> None:
    samples = latent(*shape)
    expected = decoded(stock, samples)
    actual = decoded(dropin, samples)
    assert_same(actual, expected)
    assert actual.stride() == expected.stride()
    actual.mul_(2)  # the next node may write to it


def test_decodes_without_tiles(stock: comfy.sd.VAE, dropin: RemoteVAE, caplog: pytest.LogCaptureFixture) -> None:
    samples = latent(1, 16, 20, 24)
    with caplog.at_level(logging.INFO, "raylight"):
        (actual,) = comfy_nodes.VAEDecodeTiled().decode(dropin, {"samples": samples}, 64, 16)
    assert "the sizes of tiles have no effect" in caplog.text
    assert_same(actual, decoded(stock, samples))


@pytest.mark.parametrize("shape", [(1, 96, 112, 3), (2, 91, 83, 3), (1, 64, 64, 4)])
def test_encodes_as_comfyui(shape: tuple[int, ...], stock: comfy.sd.VAE, dropin: RemoteVAE) -> None:
    pixels = pictures(*shape)
    mask = (pictures(*shape[:3]) > 0.5).float()
    encode, tiled, inpaint = (comfy_nodes.VAEEncode(), comfy_nodes.VAEEncodeTiled(), comfy_nodes.VAEEncodeForInpaint())
    expected = encode.encode(stock, pixels)[0]["samples"]
    assert_same(encode.encode(dropin, pixels)[0]["samples"], expected)
    assert_same(tiled.encode(dropin, pixels, 64, 16)[0]["samples"], expected)
    if min(shape[1:3]) % 8 == 0:
        theirs, ours = (inpaint.encode(vae, pixels, mask)[0] for vae in (stock, dropin))
        assert_same(ours["samples"], theirs["samples"])
        assert torch.equal(ours["noise_mask"], theirs["noise_mask"])


def test_leaves_the_random_state_as_comfyui(stock: comfy.sd.VAE, dropin: RemoteVAE) -> None:
    after = []
    for vae in (stock, dropin):
        torch.manual_seed(3)
        decoded(vae, latent(1, 16, 4, 4))
        after.append(torch.randn(3))
    assert torch.equal(*after)


def test_rows_come_back_without_shared_memory(
    stock: comfy.sd.VAE, dropin: RemoteVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from the workers of a Ray cluster, or where the system has no files in memory."""
    monkeypatch.setattr("raylight.driver.vae_run.new_picture", lambda is_local: None)
    samples = latent(2, 16, 9, 6)
    assert_same(decoded(dropin, samples), decoded(stock, samples))


def test_memory_of_pictures_is_released(dropin: RemoteVAE) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("raylight picture")

    before = mapped()
    picture = decoded(dropin, latent(1, 16, 8, 8))
    assert mapped() == before + 1
    del picture
    assert mapped() == before


# -- a VAE of another loader ----------------------------------------------------------------------------------------


def with_other_weights(vae: comfy.sd.VAE) -> None:
    vae.first_stage_model.taesd_decoder[1].weight.mul_(1.5)


def with_patches(vae: comfy.sd.VAE) -> None:
    weight = vae.first_stage_model.taesd_decoder[1].weight
    difference = 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    vae.patcher = vae.patcher.clone()
    vae.patcher.add_patches({"taesd_decoder.1.weight": ("diff", (difference,))}, 1.0)


@pytest.mark.parametrize("change", [with_other_weights, with_patches])
def test_changed_weights_are_sent(change: Callable[[comfy.sd.VAE], None], caplog: pytest.LogCaptureFixture) -> None:
    vae, samples = read(DEMO), latent(1, 16, 9, 7)
    plain = decoded(vae, samples)
    ours = api.parallelize_vae(vae, WORKERS)
    assert_same(decoded(ours, samples), plain)
    change(vae)
    expected = decoded(vae, samples)
    assert (expected - plain).abs().max() > 1e-2
    with caplog.at_level(logging.INFO, "raylight"):
        assert_same(decoded(api.parallelize_vae(vae, WORKERS), samples), expected)
        assert_same(decoded(vae, samples), expected)
    assert caplog.text.count("from ComfyUI's memory") == 1


def test_a_change_after_the_load_is_seen(dropin: RemoteVAE, stock: comfy.sd.VAE) -> None:
    vae, samples = api.load_vae(str(DEMO), lambda: read(DEMO), WORKERS), latent(1, 16, 9, 7)
    with_other_weights(vae)
    other = read(DEMO)
    with_other_weights(other)
    assert_same(decoded(vae, samples), decoded(other, samples))
    assert_same(decoded(dropin, samples), decoded(stock, samples))


@pytest.mark.skipif(vae_import._LOADER is None, reason="this ComfyUI does not note the file of a VAE")
def test_the_file_of_a_vae_of_comfyui_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vae = read(DEMO)
    vae.patcher.cached_patcher_init = (vae_import._LOADER, (str(DEMO), None, None))
    with caplog.at_level(logging.INFO, "raylight"):
        decoded(api.parallelize_vae(vae, WORKERS), latent(1, 16, 4, 4))
    assert "from ComfyUI's memory" not in caplog.text


def with_hook(vae: comfy.sd.VAE) -> None:
    vae.first_stage_model.taesd_decoder.register_forward_hook(lambda module, args, output: output * 0.5)


def with_code(vae: comfy.sd.VAE) -> None:
    forward = vae.first_stage_model.taesd_decoder.forward
    vae.first_stage_model.taesd_decoder.forward = lambda x: forward(x) * 0.5


def with_module(vae: comfy.sd.VAE) -> None:
    vae.first_stage_model.taesd_decoder[0] = torch.nn.Tanh()


def with_output(vae: comfy.sd.VAE) -> None:
    vae.process_output = lambda image: image.mul_(0.5)


def with_channels(vae: comfy.sd.VAE) -> None:
    torch.manual_seed(0)
    vae.first_stage_model.taesd_decoder[-1] = torch.nn.Conv2d(64, 3, 3, padding=1)
    vae.output_channels = 4


def with_padding_mode(vae: comfy.sd.VAE) -> None:
    for convolution in convolutions(vae):
        convolution.padding_mode = "circular"


def with_padding(vae: comfy.sd.VAE) -> None:
    """Pad another way by functions, as nodes for seamless pictures do."""

    def conv_forward(self: torch.nn.Conv2d, given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padded = torch.nn.functional.pad(given, self._reversed_padding_repeated_twice, mode="circular")
        return torch.nn.functional.conv2d(padded, weight, bias, self.stride)

    for convolution in convolutions(vae):
        convolution._conv_forward = MethodType(conv_forward, convolution)


def with_fewer_pads(vae: comfy.sd.VAE) -> None:
    convolutions(vae)[-1].padding = (1, 0)


def convolutions(vae: comfy.sd.VAE) -> list[torch.nn.Conv2d]:
    return [one for one in vae.first_stage_model.taesd_decoder.modules() if isinstance(one, torch.nn.Conv2d)]


def with_object_patch(vae: comfy.sd.VAE) -> None:
    vae.patcher = vae.patcher.clone()
    vae.patcher.add_object_patch("taesd_decoder.0.forward", lambda latent: latent * 0.5)


@pytest.mark.parametrize(
    "change",
    [
        with_hook,
        with_code,
        with_module,
        with_output,
        with_channels,
        with_padding_mode,
        with_padding,
        with_fewer_pads,
        with_object_patch,
    ],
)
def test_changed_code_stays_in_comfyui(
    change: Callable[[comfy.sd.VAE], None], caplog: pytest.LogCaptureFixture
) -> None:
    samples = latent(1, 16, 4, 4)
    stock, ours = read(DEMO), api.load_vae(str(DEMO), lambda: read(DEMO), WORKERS)
    plain = decoded(stock, samples)
    copied = copy.deepcopy(ours)
    with caplog.at_level(logging.INFO, "raylight"):
        assert_same(decoded(ours, samples), plain)  # a change after the first use is seen
        assert_same(decoded(copied, samples), plain)
    assert "as without workers" not in caplog.text
    for vae in (stock, ours):
        change(vae)
    expected = decoded(stock, samples)
    assert expected.shape != plain.shape or (expected - plain).abs().max() > 1e-2
    with caplog.at_level(logging.INFO, "raylight"):
        for vae in (ours, api.parallelize_vae(stock, WORKERS)):
            assert torch.equal(decoded(vae, samples), expected)
    assert caplog.text.count("the VAE decodes in ComfyUI's process, as without workers: ") == 2


def test_what_comfyui_sets_on_layers_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its choice of an attention, and what it notes when it loads weights as they are needed."""
    monkeypatch.setattr(comfy.model_management, "xformers_enabled_vae", lambda: True)
    path = write_vae(tmp_path / "vae.safetensors", "wan-narrow")
    vae = read(path)
    model: Any = vae.first_stage_model
    assert model.decoder.middle[1].optimized_attention is model_code.xformers_attention
    for layer in (model.conv1, model.conv2):
        layer.seed_key, layer.comfy_cast_weights, layer._v_signature = "conv", True, None
        layer.weight_function, layer.weight_lowvram_function = [], None
    model.model_loaded_weight_memory = 1 << 20
    assert vae_import.recipe_of(vae, "float32", str(path)).export is None
    model.decoder.middle[1].optimized_attention = lambda query, *_: query
    with pytest.raises(vae_import.CannotBuild, match=r"has changed its decoder\.middle\.1\.optimized_attention"):
        vae_import.recipe_of(vae, "float32", str(path))


class Halved(comfy.sd.VAE):
    """A VAE of a pack, which decodes in its own way."""

    def decode(self, *samples: Tensor) -> Tensor:
        return super().decode(*samples) * 0.5


def test_a_vae_of_a_packs_class_stays_in_comfyui(stock: comfy.sd.VAE, caplog: pytest.LogCaptureFixture) -> None:
    vae, samples = object.__new__(Halved), latent(1, 16, 4, 4)
    vars(vae).update(vars(stock))
    with caplog.at_level(logging.INFO, "raylight"):
        assert torch.equal(decoded(api.parallelize_vae(vae, WORKERS), samples), decoded(stock, samples) * 0.5)
    assert "as without workers: its class Halved is not that of ComfyUI" in caplog.text


def test_code_of_a_pack_in_comfyuis_classes_stays_in_comfyui(
    stock: comfy.sd.VAE, dropin: RemoteVAE, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(foreign_code, "is_foreign_file", lambda path: path == __file__)
    forward = TAESD.decode
    samples = latent(1, 16, 4, 4)
    for kind, name, code in (
        (TAESD, "decode", lambda self, given: forward(self, given) * 0.5),
        (comfy.sd.VAE, "decode", lambda self, given, options=None: given),
    ):
        with monkeypatch.context() as replacing, caplog.at_level(logging.INFO, "raylight"):
            replacing.setattr(kind, name, code)
            assert torch.equal(decoded(dropin, samples), decoded(stock, samples))
        assert f"a node has changed ComfyUI's code: {kind.__name__}.{name}" in caplog.text


def test_a_vae_without_rows_stays_in_comfyui(caplog: pytest.LogCaptureFixture) -> None:
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    ours, samples = api.parallelize_vae(vae, WORKERS), pictures(1, 3, 8, 8)
    with caplog.at_level(logging.INFO, "raylight"):
        assert torch.equal(decoded(ours, samples), decoded(vae, samples))
        assert torch.equal(ours.encode(pictures(1, 8, 8, 3)), vae.encode(pictures(1, 8, 8, 3)))
    assert caplog.text.count("PixelspaceConversionVAE cannot be split by rows: it computes nothing") == 2


def test_copies_and_new_workers(stock: comfy.sd.VAE, dropin: RemoteVAE) -> None:
    samples = latent(1, 16, 6, 6)
    copied = copy.copy(dropin)
    copied.patcher = copied.patcher.clone()  # as Select VAE Device
    for vae in (copied, copy.deepcopy(dropin), api.parallelize_vae(dropin, WORKERS), api.parallelize_vae(dropin, None)):
        assert_same(decoded(vae, samples), decoded(stock, samples))


def test_while_the_workers_are_in_a_run_it_stays_in_comfyui(
    stock: comfy.sd.VAE, dropin: RemoteVAE, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a callback after a step: the run would wait for the callback, and the workers' decode for the run."""
    decoded(dropin, latent(1, 16, 4, 4))
    session = active_session.running()
    assert session is not None
    with session._running, caplog.at_level(logging.INFO, "raylight"):
        assert torch.equal(decoded(dropin, latent(1, 16, 6, 6)), decoded(stock, latent(1, 16, 6, 6)))
    assert "as without workers: the workers are in a run" in caplog.text


def test_another_process_gets_a_vae_of_comfyui(
    stock: comfy.sd.VAE, dropin: RemoteVAE, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "raylight"):
        kind, state = dropin.__reduce_ex__(4)
    assert "to another process, where it decodes and encodes as without workers" in caplog.text
    vae = kind(*state)
    assert type(vae) is comfy.sd.VAE
    assert torch.equal(decoded(vae, latent(1, 16, 6, 6)), decoded(stock, latent(1, 16, 6, 6)))


def test_weights_are_beside_those_of_models_in_the_mapped_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "wan.safetensors", "wan-t2v", heads=2)
    path = write_vae(tmp_path / "wan-vae.safetensors", "wan-narrow")
    api.load(RayModel(WORKERS, ModelRecipe.of(str(tmp_path / "wan.safetensors"), "default")))
    stock, samples = read(path), latent(1, 16, 3, 9, 7)
    assert_same(decoded(api.load_vae(str(path), lambda: read(path), WORKERS), samples), decoded(stock, samples))
    session = active_session.running()
    assert session is not None
    held = session.run(WorkerService.memory).models
    assert [model.name for model in held][-2:] == ["wan.safetensors", path.name]
    assert held[-1].host_bytes == 0
