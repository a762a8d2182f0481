"""The environment variables of a Ray of one's own: what it is started with, and what the person has set."""

from __future__ import annotations

import os
from collections.abc import Mapping

from . import visible

TOKEN, TOKEN_PATH, AUTH_MODE = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"
_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # by default workers give way to every other program of the machine
}
# Where Ray's files and clusters are, and what is a secret; and what Ray and this module set themselves.
_UNTOLD = frozenset({"RAY_TMPDIR", "RAY_ADDRESS", "RAY_NAMESPACE", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
                     "RAY_CLIENT_MODE", AUTH_MODE, TOKEN, TOKEN_PATH, *_DEFAULTS})
_LONGEST = 120  # characters of a value that are repeated in a message

_before: dict[str, str | None] = {}


def prepare(is_local: bool, is_rocm: bool) -> None:
    """Set what Ray is to be started, or joined, with; `restore` takes back what is for one start."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if not is_local:
        return
    values = visible.for_ray(os.environ, is_rocm)
    if os.environ.get(AUTH_MODE, "token").lower() == "token" and not (
            os.environ.get(TOKEN) or os.environ.get(TOKEN_PATH)) and (token := _new_token()) is not None:
        # Ray would write one into the home of the person, for good; and it may not be able to.
        values[TOKEN] = token
        _before.setdefault(AUTH_MODE, os.environ.get(AUTH_MODE))  # Ray sets it
    for name, value in values.items():
        _before.setdefault(name, os.environ.get(name))
        os.environ[name] = value
    if TOKEN in values:
        _read_again()


def restore() -> None:
    """Take back what `prepare` has set for one start: another Ray may be joined next, with another token or none."""
    had_token = TOKEN in _before
    for name, value in _before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _before.clear()
    if had_token:
        _read_again()


def of_person(environ: Mapping[str, str] = os.environ) -> str:
    """A sentence that names what is set for Ray in ComfyUI's environment, which may be why Ray does otherwise than it
    should; empty where nothing is."""
    found = {name: value for name, value in sorted(environ.items())
             if name.startswith("RAY_") and name not in _UNTOLD and value}
    if not found:
        return ""
    named = ", ".join(f"{name}={value if len(value) <= _LONGEST else value[:_LONGEST] + '...'}"
                      for name, value in found.items())
    return f" ComfyUI was started with {named}, which changes Ray: try without."


def _new_token() -> str | None:
    """A token as Ray makes them; None for a Ray that knows no tokens."""
    try:
        from ray._private.authentication.authentication_token_generator import generate_new_authentication_token
    except ImportError:
        return None
    return generate_new_authentication_token()


def _read_again() -> None:
    """Have Ray, in this process, read the mode and the token anew: it keeps both."""
    from ray._raylet import AuthenticationTokenLoader, Config

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
