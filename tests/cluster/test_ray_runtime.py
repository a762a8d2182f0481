"""Addresses are checked before Ray is asked to join."""

from __future__ import annotations

import socket
import threading

import pytest

from raylight.cluster import ray_runtime


def test_nobody() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(OSError):
            ray_runtime.check_reachable(f"127.0.0.1:{taken.getsockname()[1]}")


@pytest.mark.parametrize("answers", [True, False])
def test_another_program(answers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_runtime, "_CONNECT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        if answers:

            def serve() -> None:
                connection, _ = server.accept()
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

            threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(ConnectionError, match="another program"):
            ray_runtime.check_reachable(f"127.0.0.1:{server.getsockname()[1]}")


@pytest.mark.parametrize("address", ["auto", "ray://head:10001"])
def test_addresses_of_other_forms_are_left_to_ray(address: str) -> None:
    ray_runtime.check_reachable(address)
