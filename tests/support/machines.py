"""Two machines on one: namespaces with an address, a name, processes, folders and a Ray node of their own.

Each machine has its folder at the same path, `FOLDER` within the folder of both, so that a path that one sends to the
other leads to another file there, or to none, as between real machines. Its first process ends with all that it has
started, and nothing of a machine outlives it: interfaces, mounts and names are the namespace's.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

HERE = "here"
ROOT = Path(__file__).resolve().parents[2]
PORT = 6379
_TOOLS = ("unshare", "nsenter", "ip")
_NAMESPACES = ("--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc")
_READY_S, _START_S, _STORE_BYTES = 20, 90, 200_000_000
_TC = ("env", "PATH=/usr/sbin:/sbin:/usr/bin:/bin", "tc")
_TBF = "tbf rate {} burst 2mb latency 50ms"  # what a network card sends at once, and what waits in its queue
# The path of Ray's sockets is short, and so is this one.
_ROOT = "/tmp"
COUNTERS = "/proc/net/dev"


def sent_bytes(counters: str) -> int:
    """Return how many bytes a machine has sent over its link, by what its file COUNTERS has."""
    of_link = next(line for line in counters.splitlines() if "eth0:" in line)
    return int(of_link.partition(":")[2].split()[8])


def why_not() -> str:
    """Return why this system can have no such machines, "" if it can."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} is not installed"
    if os.geteuid() != 0:
        return "network namespaces with links between them need root's rights"
    trial = subprocess.run(["unshare", *_NAMESPACES, "true"], capture_output=True, text=True, timeout=20)
    return f"namespaces are not permitted here: {trial.stderr.strip()}" if trial.returncode else ""


class Namespaces:
    """A process with namespaces of its own. What it has there goes with it: interfaces, mounts and processes."""

    def __init__(self, kinds: tuple[str, ...], setup: str, ready: Path) -> None:
        command = ["unshare", *kinds, "sh", "-c", f"{setup} && touch {ready} && exec sleep infinity"]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + _READY_S
        while not ready.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"namespaces cannot be set up: {self._process.communicate(timeout=5)[1]}")
            time.sleep(0.02)
        children = psutil.Process(self._process.pid).children()  # --fork has one, which is process 1 there
        self.pid = children[0].pid if children else self._process.pid

    def run(self, *command: str) -> None:
        """Run a command there. Raises CalledProcessError."""
        subprocess.run(["nsenter", "-t", str(self.pid), "--net", *command], check=True)

    def end(self) -> None:
        """Kill it, and all that runs there."""
        if self._process.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        self._process.communicate(timeout=_READY_S)


class FakeMachine:
    """One machine. `folder` is its own, and `here` the path by which its processes see it; `models` and
    `packs` are its folders of models and of node packs, within both.
    """

    def __init__(self, name: str, address: str, base: Path, token: str) -> None:
        self.name, self.address, self.folder, self.here = name, address, base / name, base / HERE
        self.models, self.packs = f"models of {name}", f"packs of {name}"
        shutil.rmtree(self.folder, ignore_errors=True)  # of the machine before that had this name
        (self.folder / "ray").mkdir(parents=True)
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "TMPDIR": str(self.here),
            "HOME": str(self.here),
            "PYTHONPATH": "",
        }
        setup = f"hostname {name} && mount -t tmpfs tmpfs /dev/shm && mount --bind {self.folder} {self.here}"
        self._namespaces = Namespaces(_NAMESPACES, f"{setup} && ip link set lo up", self.folder / "ready")
        self.pid = self._namespaces.pid

    def command(self, *command: str | Path) -> list[str]:
        """Return a command to run here for one to run on the machine, in its folder."""
        return ["nsenter", "-t", str(self.pid), "--all", f"--wdns={self.here}", *map(str, command)]

    def run(self, *command: str | Path, timeout_s: float = _START_S, **variables: str) -> str:
        """Run a command on the machine and return its output. Raises RuntimeError: when it fails."""
        done = subprocess.run(
            self.command(*command),
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} on {self.name}: {done.stdout}")
        return done.stdout

    def start_ray(self, head: FakeMachine, cpus: int, **variables: str) -> None:
        """Start the machine's Ray node, of the cluster of `head`."""
        role = ["--head"] if head is self else [f"--join={head.address}:{PORT}"]
        output = self.run(
            sys.executable,
            "-m",
            "raylight.cluster.node",
            *role,
            f"--address={self.address}",
            f"--model-paths={self.model_paths()}",
            "--",
            f"--num-cpus={cpus}",
            f"--temp-dir={self.here}/ray",
            f"--object-store-memory={_STORE_BYTES}",
            PYTHONPATH=str(ROOT),
            **variables,
        )
        (self.folder / "ray.log").write_text(output)

    def model_paths(self) -> Path:
        """Write the file that names this machine's model folders, and return its path there."""
        (self.folder / self.models).mkdir(exist_ok=True)
        (self.folder / "paths.yaml").write_text(
            f"of_{self.name}:\n  base_path: {self.here}\n"
            f"  diffusion_models: {self.models}\n  custom_nodes: {self.packs}\n"
        )
        return self.here / "paths.yaml"

    def sent_bytes(self) -> int:
        """Return how many bytes the machine has sent over its link."""
        return sent_bytes(self.run("cat", COUNTERS))

    def plug(self, interface: str) -> None:
        """Connect the machine by an interface of this system, which leaves it."""
        subprocess.run(["ip", "link", "set", interface, "netns", str(self.pid)], check=True)
        self.run("ip", "link", "set", interface, "name", "eth0")
        self.run("ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")

    def end(self) -> None:
        """End the machine at once, as by its power switch."""
        self._namespaces.end()


class FakeCluster:
    """Two machines, alpha and beta, at a switch. Ray runs on both; alpha is the head."""

    def __init__(self, cpus: tuple[int, int] = (1, 1), token: str = "a" * 64) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="rlm", dir=_ROOT))
        (self.base / HERE).mkdir()
        self._token, self._switch = token, None
        self._ended: list[FakeMachine] = []
        try:
            bridge = "ip link add switch type bridge && ip link set switch up"
            self._switch = Namespaces(("--net",), bridge, self.base / "switch")
            self.alpha = self._machine("alpha", "10.77.0.1")
            self.beta = self._machine("beta", "10.77.0.2")
            self.alpha.start_ray(self.alpha, cpus[0])
            self.beta.start_ray(self.alpha, cpus[1])
        except BaseException:
            self.end()
            raise

    def replace_beta(self, cpus: int = 1) -> None:
        """Have a new machine in the place of beta, with nothing on it."""
        self.beta.end()
        self.beta = self._machine("beta", "10.77.0.2")
        self.beta.start_ray(self.alpha, cpus)

    def _machine(self, name: str, address: str) -> FakeMachine:
        machine = FakeMachine(name, address, self.base, self._token)
        self._ended.append(machine)
        # Both ends have names of this system for a moment. The port of a machine that has ended stays a while.
        own, port = f"rl{os.getpid()}", f"port{len(self._ended)}"
        subprocess.run(["ip", "link", "add", own, "type", "veth", "peer", "name", f"{own}p"], check=True)
        machine.plug(own)
        subprocess.run(["ip", "link", "set", f"{own}p", "netns", str(self._switch.pid)], check=True)
        self._switch.run("ip", "link", "set", f"{own}p", "name", port, "master", "switch", "up")
        return machine

    @property
    def address(self) -> str:
        """The address for `ray_cluster_address`."""
        return f"{self.alpha.address}:{PORT}"

    def python(self, script: str, *arguments: Any, **variables: str) -> subprocess.Popen[str]:
        """Start a Python script of tests/support on alpha, as the process of ComfyUI."""
        return subprocess.Popen(
            self.alpha.command(sys.executable, ROOT / "tests" / "support" / script, *map(str, arguments)),
            env=self.alpha.environment | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.base / "driver.log").open("a"),
            text=True,
        )

    def log(self) -> str:
        """Return what scripts on alpha have logged."""
        path = self.base / "driver.log"
        return path.read_text() if path.exists() else ""

    def limit(self, rate: str) -> None:
        """Let each machine send no faster than this, such as "1gbit"; "" is no limit. Raises RuntimeError: without the
        kernel's token bucket filter.
        """
        for machine in (self.alpha, self.beta):
            kind = (_TBF.format(rate) if rate else "pfifo").split()
            machine.run(*_TC, "qdisc", "replace", "dev", "eth0", "root", *kind)

    def cut(self) -> None:
        """Cut the link to beta at the switch."""
        self._switch.run("ip", "link", "set", f"port{len(self._ended)}", "down")

    def end(self) -> None:
        """End both machines and the switch, and remove their folders."""
        for one in [*self._ended, *filter(None, [self._switch])]:
            one.end()
        shutil.rmtree(self.base, ignore_errors=True)
