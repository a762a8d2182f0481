"""Addresses are checked before Ray is asked to join."""

from __future__ import annotations

import socket
import threading

import pytest

from raylight.cluster import reachability
from raylight.cluster.reachability import check_reachable


def test_nobody() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(OSError):
            check_reachable(f"127.0.0.1:{taken.getsockname()[1]}")


@pytest.mark.parametrize("answers", [True, False])
def test_another_program(answers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reachability, "_CONNECT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        if answers:

            def serve() -> None:
                connection, _ = server.accept()
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

            threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(ConnectionError, match="another program"):
            check_reachable(f"127.0.0.1:{server.getsockname()[1]}")


@pytest.mark.parametrize("address", ["auto", "ray://head:10001"])
def test_addresses_of_other_forms_are_left_to_ray(address: str) -> None:
    check_reachable(address)
