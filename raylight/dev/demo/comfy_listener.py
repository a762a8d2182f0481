"""ComfyUI's messages to its clients while it works: progress, previews, results, errors."""

from __future__ import annotations

import json
import logging
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import websocket

logger = logging.getLogger(__name__)

# Kinds of binary frames, from ComfyUI's protocol.py.
_PREVIEW, _TEXT, _PREVIEW_WITH_METADATA = 1, 3, 4
_IMAGE_FORMATS = {1: "image/jpeg", 2: "image/png"}


@dataclass(frozen=True, slots=True)
class Event:
    """A JSON message, such as "executing", "progress", "executed", "execution_error"."""

    type: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Preview:
    """A preview frame: an encoded image. `metadata` names the prompt and the node."""

    format: str
    image: bytes = field(repr=False)
    metadata: dict[str, Any] = field(default_factory=dict)


Message = Event | Preview


class Listener:
    """Collect all messages to one client in a thread: those about prompts submitted with its client id."""

    def __init__(self, url: str, timeout: float = 10.0) -> None:
        """Connect to a /ws address. On return the server knows this client, so no message is missed."""
        self._messages: list[Message] = []
        self._changed = threading.Condition()
        self._ended: Exception | None = None
        self._socket = websocket.create_connection(url, timeout=timeout, enable_multithread=True)
        # What a browser says as well. With it, previews come with the number of their node and prompt.
        self._socket.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
        self._socket.settimeout(None)
        self._thread = threading.Thread(target=self._read, name="comfyui-messages", daemon=True)
        self._thread.start()
        try:
            self.wait_for(lambda message: isinstance(message, Event) and message.type == "feature_flags", timeout)
        except BaseException:
            self.close()
            raise

    @property
    def messages(self) -> list[Message]:
        """Return all messages so far, in order."""
        with self._changed:
            return list(self._messages)

    @property
    def previews(self) -> list[Preview]:
        return [message for message in self.messages if isinstance(message, Preview)]

    def events(self, type: str) -> list[Event]:
        """Return all events of one type so far."""
        return [message for message in self.messages if isinstance(message, Event) and message.type == type]

    def wait_for(self, predicate: Callable[[Message], bool], timeout: float) -> Message:
        """Return the first message, past or future, that satisfies `predicate`.

        Raises TimeoutError: none arrived in time. Raises ConnectionError: none can arrive any more.
        """
        deadline = time.monotonic() + timeout
        seen = 0
        with self._changed:
            while True:
                while seen < len(self._messages):
                    if predicate(self._messages[seen]):
                        return self._messages[seen]
                    seen += 1
                if self._ended is not None:
                    raise ConnectionError(f"ComfyUI has closed the connection after {seen} messages") from self._ended
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    last = self._messages[-1] if self._messages else None
                    raise TimeoutError(f"none of {seen} messages is the expected one after {timeout} s; last: {last}")
                self._changed.wait(remaining)

    def close(self) -> None:
        """Close the connection and end the thread. The collected messages stay."""
        try:
            self._socket.send_close()
            self._thread.join(timeout=2.0)
        except (OSError, websocket.WebSocketException) as error:
            logger.debug("the connection was closed already: %s", error)
        finally:
            self._socket.shutdown()
            self._thread.join(timeout=2.0)

    def _read(self) -> None:
        ended: Exception = ConnectionError("closed")
        try:
            while True:
                code, payload = self._socket.recv_data()
                if code == websocket.ABNF.OPCODE_CLOSE:
                    break
                message = _decode(code, payload)
                if message is not None:
                    with self._changed:
                        self._messages.append(message)
                        self._changed.notify_all()
        except (OSError, ValueError, struct.error, AttributeError, websocket.WebSocketException) as error:
            ended = error  # AttributeError: `close` has taken the socket away while this thread was about to read
        finally:
            with self._changed:
                self._ended = ended
                self._changed.notify_all()


def _decode(code: int, payload: bytes) -> Message | None:
    """Decode a frame; None for an unknown kind of binary frame."""
    if code == websocket.ABNF.OPCODE_TEXT:
        content = json.loads(payload)
        return Event(content["type"], content.get("data") or {})
    if code != websocket.ABNF.OPCODE_BINARY:
        return None
    (kind,) = struct.unpack_from(">I", payload)
    (number,) = struct.unpack_from(">I", payload, 4)
    rest = payload[8:]
    if kind == _PREVIEW:
        return Preview(_IMAGE_FORMATS.get(number, "unknown"), rest)
    if kind == _PREVIEW_WITH_METADATA:
        metadata = json.loads(rest[:number])
        return Preview(metadata.get("image_type", "unknown"), rest[number:], metadata)
    if kind == _TEXT:
        return Event("text", {"node": rest[:number].decode(), "text": rest[number:].decode()})
    return None
