"""The demo's VAE by ComfyUI, and on two workers."""

from __future__ import annotations

import comfy.sd
import pytest
from vae_nodes import DEMO, WORKERS, read

from raylight.driver import api
from raylight.driver.remote_vae import RemoteVAE


@pytest.fixture(scope="module")
def stock() -> comfy.sd.VAE:
    return read(DEMO)


@pytest.fixture(scope="module")
def dropin() -> RemoteVAE:
    return api.load_vae(str(DEMO), lambda: read(DEMO), WORKERS)
