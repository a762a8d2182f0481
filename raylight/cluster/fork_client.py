"""Start a worker of Ray as a fork of the process of `fork_server.py`: `fork_client.py SOCKET SCRIPT ARGUMENTS...`.

Becomes the worker itself where that process has gone or does not answer. Imports as little as possible: it runs at each
start of a worker.
"""

import json
import os
import socket
import sys

_WAIT_S = 45.0  # Ray waits for a minute


def _was_forked(path: str, arguments: list[str]) -> bool:
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    with socket.socket(socket.AF_UNIX) as server:
        server.settimeout(_WAIT_S)
        try:
            server.connect(path)
            socket.send_fds(server, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
            return server.recv(16) == b"forked"
        except OSError:
            return False


if __name__ == "__main__" and not _was_forked(sys.argv[1], sys.argv[2:]):
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
