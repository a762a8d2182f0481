"""Whether a Ray cluster answers at an address."""

from __future__ import annotations

import os
import socket
import ssl

_CONNECT_S = 5.0
# The preface of an HTTP/2 connection, which gRPC uses, and empty settings (RFC 9113, 3.4 and 6.5).
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_FRAME_HEADER_BYTES, _TYPE_INDEX, _SETTINGS = 9, 3, 4


def check_reachable(address: str) -> None:
    """Check that a gRPC server answers at "host:port". Does nothing for addresses of other forms.

    Ray itself would wait for minutes, and then end ComfyUI. Raises OSError: when nobody listens there, or when TLS is
    asked for and fails. Raises ConnectionError: when another program listens.
    """
    host, separator, port = address.rpartition(":")
    if not (separator and port.isdigit() and "//" not in address):
        return
    with _connect(host, int(port)) as connection:
        connection.sendall(_PREFACE)
        answer = b""
        try:
            while len(answer) < _FRAME_HEADER_BYTES and (more := connection.recv(_FRAME_HEADER_BYTES - len(answer))):
                answer += more
        except TimeoutError:
            pass
    if len(answer) < _FRAME_HEADER_BYTES or answer[_TYPE_INDEX] != _SETTINGS:
        raise ConnectionError("another program listens there, which is not Ray")


def _connect(host: str, port: int) -> socket.socket:
    """Return a connection, with TLS if Ray's variables ask for it."""
    connection = socket.create_connection((host, port), timeout=_CONNECT_S)
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return connection
    try:
        context = ssl.create_default_context(cafile=os.environ.get("RAY_TLS_CA_CERT"))
        context.check_hostname = False  # Ray's certificates are of machines with changing addresses
        context.load_cert_chain(os.environ["RAY_TLS_SERVER_CERT"], os.environ["RAY_TLS_SERVER_KEY"])
        context.set_alpn_protocols(["h2"])
        return context.wrap_socket(connection)
    except KeyError as error:
        connection.close()
        raise ConnectionError(f"RAY_USE_TLS is set, and {error.args[0]} is not") from error
    except BaseException:
        connection.close()
        raise
