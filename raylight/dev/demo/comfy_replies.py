"""ComfyUI's answers as types: a prompt's history, the queue, and errors as exceptions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request


class ComfyError(RuntimeError):
    """ComfyUI did not start, has ended, or refuses a request."""


class PromptRejected(ComfyError):
    """ComfyUI found a graph invalid. `node_errors` has its reasons by node id."""

    def __init__(self, message: str, node_errors: dict[str, Any]) -> None:
        super().__init__(message)
        self.node_errors = node_errors


class PromptFailed(ComfyError):
    """A node raised. `details` is ComfyUI's execution_error: node_id, node_type, exception_type, traceback, ..."""

    def __init__(self, message: str, details: dict[str, Any]) -> None:
        super().__init__(message)
        self.details = details


class PromptInterrupted(PromptFailed):
    """The prompt was cancelled. `details` is ComfyUI's execution_interrupted."""


@dataclass(frozen=True, slots=True)
class History:
    """ComfyUI's record of a prompt that has ended in any way. `messages` are (type, data)."""

    prompt_id: str
    status: str
    outputs: dict[str, dict[str, Any]]
    messages: tuple[tuple[str, dict[str, Any]], ...]

    @classmethod
    def of(cls, prompt_id: str, entry: dict[str, Any]) -> History:
        """Make it from an entry of /history."""
        status = entry.get("status") or {}
        messages = tuple((kind, data) for kind, data in status.get("messages", ()))
        return cls(prompt_id, status.get("status_str", "unknown"), entry.get("outputs", {}), messages)

    def message(self, type: str) -> dict[str, Any] | None:
        """Return the data of the first message of a type, such as "execution_error"."""
        return next((data for kind, data in self.messages if kind == type), None)

    @property
    def seconds(self) -> float:
        """Return how long it ran, by ComfyUI's own clock."""
        stamps = [data["timestamp"] for _, data in self.messages if "timestamp" in data]
        return (max(stamps) - min(stamps)) / 1000 if stamps else 0.0


@dataclass(frozen=True, slots=True)
class Queue:
    """The ids of the running and the waiting prompts."""

    running: tuple[str, ...]
    pending: tuple[str, ...]

    @classmethod
    def of(cls, content: dict[str, Any]) -> Queue:
        """Make it from the answer to /queue, whose items are [number, prompt id, graph, ...]."""
        running, pending = (tuple(item[1] for item in content[name]) for name in ("queue_running", "queue_pending"))
        return cls(running, pending)


def refusal(request: Request, response: HTTPError) -> ComfyError:
    """Return ComfyUI's answer with an error status as an exception with its text."""
    body = response.read().decode("utf-8", errors="replace")
    try:
        content = json.loads(body)
    except ValueError:
        content = None
    if not isinstance(content, dict) or "node_errors" not in content:
        return ComfyError(f"ComfyUI refuses {request.full_url} with status {response.code}: {body[:2000]}")
    error = content.get("error")
    lines = [str(error.get("message", error) if isinstance(error, dict) else error)]
    for node_id, node in content["node_errors"].items():
        for problem in node.get("errors", ()):
            lines.append(f"  node {node_id} ({node.get('class_type')}): {problem['message']}: {problem['details']}")
    return PromptRejected("\n".join(lines), content["node_errors"])


def raise_unless_success(history: History) -> None:
    """Raise PromptFailed or PromptInterrupted, with ComfyUI's own text, if the prompt did not succeed."""
    if (details := history.message("execution_error")) is not None:
        raise PromptFailed(
            f"node {details.get('node_id')} ({details.get('node_type')}) raised {details.get('exception_type')}: "
            f"{str(details.get('exception_message', '')).strip()}",
            details,
        )
    if (details := history.message("execution_interrupted")) is not None:
        raise PromptInterrupted(f"prompt {history.prompt_id} was interrupted", details)
    if history.status != "success":
        raise PromptFailed(f"prompt {history.prompt_id} ended with status {history.status}", {})
