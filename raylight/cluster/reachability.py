"""Whether a Ray cluster answers at an address."""

from __future__ import annotations

import socket

_CONNECT_S = 5.0
# The preface of an HTTP/2 connection, which gRPC uses, and empty settings (RFC 9113, 3.4 and 6.5).
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_FRAME_HEADER_BYTES, _TYPE_INDEX, _SETTINGS = 9, 3, 4


def check_reachable(address: str) -> None:
    """Check that a gRPC server answers at "host:port". Does nothing for addresses of other forms.

    Ray itself would wait for minutes, and then end ComfyUI. Raises OSError: when nobody listens there.
    Raises ConnectionError: when another program does.
    """
    host, separator, port = address.rpartition(":")
    if not (separator and port.isdigit() and "//" not in address):
        return
    with socket.create_connection((host, int(port)), timeout=_CONNECT_S) as connection:
        connection.sendall(_PREFACE)
        answer = b""
        try:
            while len(answer) < _FRAME_HEADER_BYTES and (more := connection.recv(_FRAME_HEADER_BYTES - len(answer))):
                answer += more
        except TimeoutError:
            pass
    if len(answer) < _FRAME_HEADER_BYTES or answer[_TYPE_INDEX] != _SETTINGS:
        raise ConnectionError("another program listens there, which is not Ray")
