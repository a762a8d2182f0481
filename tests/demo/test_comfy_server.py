"""The port of a server, which starts seconds after it was found free."""

from __future__ import annotations

import os
import socket

import pytest

from raylight.dev.demo.comfy_server import _free_port


@pytest.mark.skipif(os.name != "posix", reason="addresses are reused in another way")
def test_a_port_is_kept_for_the_server() -> None:
    with _free_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with socket.create_server(("127.0.0.1", port)):  # it reuses addresses, as asyncio's servers do
            socket.create_connection(("127.0.0.1", port)).close()
