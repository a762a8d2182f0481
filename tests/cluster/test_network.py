"""The interface that leads to another machine."""

from __future__ import annotations

import pytest

from raylight.cluster import network
from raylight.cluster.ray_runtime import loopback_interface


def test_the_interface_is_that_of_the_route() -> None:
    environment: dict[str, str] = {}
    network.use_route_to("127.0.0.1", environment)
    assert environment == dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), loopback_interface())


def test_a_users_choice_rules() -> None:
    environment = {"NCCL_SOCKET_IFNAME": "ib0"}
    network.use_route_to("127.0.0.1", environment)
    assert environment == {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": loopback_interface()}


def test_without_a_route_nothing_is_chosen(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def no_route(_: str) -> str:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(network, "address_towards", no_route)
    environment: dict[str, str] = {}
    network.use_route_to("192.0.2.7", environment)
    assert environment == {}
    assert "no route to 192.0.2.7" in caplog.text
