"""Start Ray on a machine for Raylight: `python -m raylight.cluster.node --head`, or `--join HOST:PORT` on each other.

It is `ray start` with a token, without what Raylight does not need, with the machine's address towards the others, and
with the folders of this machine's ComfyUI and Raylight, which its workers use. It needs no GPU and no running ComfyUI.
"""

from __future__ import annotations

import argparse
import os
import platform
import secrets
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .network import address_towards
from .ray_environment import AUTH_MODE, MODEL_PATHS_VARIABLE, PATH_VARIABLE, TOKEN, TOKEN_PATH, default_token

PACK = Path(__file__).resolve().parents[2]
_PORT = 6379
_OUTSIDE = "192.0.2.1"  # an address that nobody has (RFC 5737): the route to it is the default one


def main(arguments: Sequence[str] | None = None) -> int:
    """Start Ray's node of this machine. Return `ray start`'s exit status, or 2 for what is missing."""
    options = _parse(arguments)
    head_host, _, head_port = (options.join or "").rpartition(":")
    if options.join and not (head_host and head_port.isdigit()):
        return _fail(f"--join {options.join}: write the host and the port of the head, such as 10.0.0.1:{_PORT}")
    comfyui = Path(options.comfyui or os.environ.get("COMFYUI_PATH") or PACK.parents[1]).resolve()
    if not (comfyui / "comfy").is_dir():
        return _fail(f"there is no ComfyUI in {comfyui}: name its folder by --comfyui")
    missing = [path for path in options.model_paths if not os.path.isfile(path)]
    if missing:
        return _fail(f"--model-paths {missing[0]}: there is no such file")
    try:
        address = options.address or address_towards(head_host or _OUTSIDE)
    except OSError as error:
        return _fail(f"no route leads to the other machines ({error}): name this machine's address by --address")
    token = _token_file(may_make=options.head)
    if token is None:
        return _fail(
            f"this machine has no token of the cluster: copy {default_token()} from the head to the same place here, "
            f"or set {TOKEN_PATH}"
        )
    environment = _environment(options, comfyui, token)
    status = subprocess.run(_command(options, address), env=environment).returncode
    if status == 0:
        sys.stdout.write(_next_steps(options, address, token))
    return status


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m raylight.cluster.node", description=__doc__)
    role = parser.add_mutually_exclusive_group(required=True)
    role.add_argument("--head", action="store_true", help="be the first machine of a new cluster")
    role.add_argument("--join", metavar="HOST:PORT", help="join the cluster of this head")
    parser.add_argument("--address", help="this machine's address in the cluster, if not the one on the route there")
    parser.add_argument("--port", type=int, default=_PORT, help="the head's port (%(default)s)")
    parser.add_argument("--comfyui", help="the folder of ComfyUI, if Raylight is not in its custom_nodes")
    parser.add_argument(
        "--model-paths", action="append", default=[], help="a file such as extra_model_paths.yaml (may be repeated)"
    )
    parser.add_argument("rest", nargs="*", help="after --: further options of `ray start`, such as --num-gpus=1")
    return parser.parse_args(arguments)


def _command(options: argparse.Namespace, address: str) -> list[str]:
    role = [f"--address={options.join}"]
    if options.head:
        role = ["--head", f"--port={options.port}", "--include-dashboard=false"]
    ray = Path(sys.executable).with_name("ray")
    start = [str(ray)] if ray.exists() else [sys.executable, "-m", "ray.scripts.scripts"]
    return [*start, "start", *role, f"--node-ip-address={address}", "--disable-usage-stats", *options.rest]


def _environment(options: argparse.Namespace, comfyui: Path, token: str) -> dict[str, str]:
    """Return the environment of Ray's processes and of the workers here."""
    found = dict(os.environ)
    found |= {AUTH_MODE: "token", PATH_VARIABLE: os.pathsep.join((str(comfyui), str(PACK)))}
    found.setdefault("RAY_worker_niceness", "0")
    if token != _GIVEN:
        found[TOKEN_PATH] = token
    if options.model_paths:
        found[MODEL_PATHS_VARIABLE] = os.pathsep.join(map(os.path.abspath, options.model_paths))
    return found


_GIVEN = f"the variable {TOKEN}"


def _token_file(may_make: bool) -> str | None:
    """Return the file of the cluster's token, or `_GIVEN`; None if there is none, and none may be made."""
    if os.environ.get(TOKEN):
        return _GIVEN
    path = Path(os.environ.get(TOKEN_PATH) or default_token())
    if not path.is_file():
        if not may_make:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    return str(path)


def _next_steps(options: argparse.Namespace, address: str, token: str) -> str:
    if not options.head:
        return f"{platform.node()} ({address}) is in the cluster of {options.join}.\n"
    return (
        f"\n{platform.node()} is the head of a cluster. On each other machine, with the same versions of ComfyUI, "
        f"Raylight and PyTorch:\n"
        f"  copy the token, {token}, to the same place there (it lets in whoever has it)\n"
        f"  python -m raylight.cluster.node --join {address}:{options.port}\n"
        f"In ComfyUI on any of them, set ray_cluster_address = {address}:{options.port} in Ray Initializer.\n"
    )


def _fail(text: str) -> int:
    sys.stderr.write(f"{text}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
