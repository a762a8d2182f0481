"""Whether a Ray cluster can be at an address, asked before Ray is: it would wait for minutes, and then end ComfyUI."""

from __future__ import annotations

import socket

_PATIENCE_S = 5.0
# What opens a connection of HTTP/2, of which gRPC is made, and empty settings (RFC 9113, 3.4 and 6.5).
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_FRAME_HEADER, _KIND_AT, _SETTINGS = 9, 3, 4


def at(address: str) -> None:
    """Knock at "host:port"; does nothing for addresses of other forms.

    Raises OSError where nobody listens, or whoever does is not Ray.
    """
    host, separator, port = address.rpartition(":")
    if not (separator and port.isdigit() and "//" not in address):
        return
    with socket.create_connection((host, int(port)), timeout=_PATIENCE_S) as connection:
        connection.sendall(_GREETING)
        answer = b""
        try:
            while len(answer) < _FRAME_HEADER and (more := connection.recv(_FRAME_HEADER - len(answer))):
                answer += more
        except TimeoutError:
            pass
    if len(answer) < _FRAME_HEADER or answer[_KIND_AT] != _SETTINGS:
        raise ConnectionError("another program listens there, which is not Ray")
