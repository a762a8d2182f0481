"""A real ComfyUI as a subprocess, driven through the HTTP and websocket interface that a browser uses."""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from raylight.dev.setup.comfyui import ComfyUI
from raylight.driver.preflight import is_older

from .comfy_listener import Listener
from .comfy_process import ComfyProcess
from .comfy_replies import ComfyError, History, Queue, raise_unless_success, refusal

logger = logging.getLogger(__name__)

Graph = Mapping[str, Mapping[str, Any]]
_POLL = 0.1


class ComfyServer:
    """ComfyUI on a free port of the loopback interface, which writes only into its own directory.

    Use it as a context manager: no process is left behind, whatever happens inside.

        with ComfyServer(work_dir, model_paths={"diffusion_models": models}) as server:
            history = server.run(graph, timeout=60)
            files = server.output_files(history)
    """

    def __init__(
        self,
        work_dir: Path,
        *,
        comfyui: Path | None = None,
        model_paths: Mapping[str, Path] | None = None,
        extra_args: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        start_timeout: float = 300.0,
    ) -> None:
        """Prepare, start nothing yet.

        `comfyui` is its root, by default COMFYUI_PATH. `model_paths` are further directories by ComfyUI's name of
        their kind ("diffusion_models", "loras", "datasets", ...). `extra_args` go to its main.py, and `environ` adds
        to this process's environment.
        """
        if comfyui is None and not os.environ.get("COMFYUI_PATH"):
            raise ValueError("which ComfyUI to start is not known: set COMFYUI_PATH to its directory, or pass comfyui")
        self.comfyui = Path(comfyui or os.environ["COMFYUI_PATH"]).expanduser().absolute()
        if not (self.comfyui / "main.py").is_file():
            raise ValueError(f"{self.comfyui} is not a ComfyUI: it has no main.py")
        self.work_dir = Path(work_dir).absolute()
        self.log = self.work_dir / "comfyui.log"
        self.client_id = uuid.uuid4().hex
        self.port: int | None = None
        self._model_paths = dict(model_paths or {})
        self._extra_args = list(extra_args)
        self._environ = dict(environ or {})
        self._start_timeout = start_timeout
        self._process: ComfyProcess | None = None
        # A proxy that the environment names must not get between this process and the loopback interface.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    # -- life ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start it and wait until it answers. Raises ComfyError: it does not; with the end of its log."""
        if self._process is not None:
            raise ComfyError("this ComfyUI is running already")
        began = time.monotonic()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_bytes(b"")
        self._bring_datasets()
        environ = os.environ | {"PYTHONUNBUFFERED": "1"} | self._environ
        with _free_port() as self.port:
            self._process = ComfyProcess(self._command(), cwd=self.comfyui, environ=environ, log=self.log)
            try:
                self._wait_until_it_answers(began + self._start_timeout)
            except BaseException:
                self.stop()
                raise
        logger.info("ComfyUI answers on port %d after %.1f s", self.port, time.monotonic() - began)

    def _bring_datasets(self) -> None:
        """Copy datasets to the output directory, where ComfyUI before 0.30 looks for them."""
        source = self._model_paths.get("datasets")
        if source is not None and is_older(ComfyUI(self.comfyui, "").version, "0.30.0"):
            shutil.copytree(source, self.directory("output"), dirs_exist_ok=True)

    def stop(self) -> None:
        """Interrupt, terminate, then kill it and all that it started. Does nothing if it is not running."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def __enter__(self) -> ComfyServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def directory(self, kind: str) -> Path:
        """Return its directory for "input", "output", "temp" or "user" files."""
        return self.work_dir / kind

    def log_tail(self, lines: int = 40) -> str:
        """Return the end of its output, without color codes."""
        text = re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text("utf-8", errors="replace"))
        return "\n".join(text.splitlines()[-lines:])

    # -- what it knows ------------------------------------------------------------------------------------------

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """Return the description of one node class, or of all by name. Raises LookupError: there is no such class."""
        if node is None:
            return self._get("/object_info")
        info = self._get(f"/object_info/{node}")
        if node not in info:
            raise LookupError(
                f"this ComfyUI has no node {node}. See {self.log} for why its pack may have failed to load"
            )
        return info[node]

    def queue(self) -> Queue:
        return Queue.of(self._get("/queue"))

    def history(self, prompt_id: str) -> History | None:
        """Return the record of a prompt, or None if it has not ended."""
        entry = self._get(f"/history/{prompt_id}").get(prompt_id)
        return None if entry is None else History.of(prompt_id, entry)

    # -- work ---------------------------------------------------------------------------------------------------

    def submit(self, graph: Graph) -> str:
        """Queue a graph in API format and return its prompt id. Raises PromptRejected: it is invalid."""
        return self._post("/prompt", {"prompt": graph, "client_id": self.client_id})["prompt_id"]

    def wait(self, prompt_id: str, timeout: float) -> History:
        """Wait for a prompt's end.

        Raises PromptFailed or PromptInterrupted: it did not succeed. Raises TimeoutError: it did not end in time, and
        was interrupted.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                history = self.history(prompt_id)
            except ConnectionError as error:
                # Too busy to answer; or it has just died, which the next request finds.
                logger.debug("%s", error)
                history = None
            if history is not None:
                raise_unless_success(history)
                return history
            if time.monotonic() > deadline:
                self.interrupt(prompt_id)
                raise TimeoutError(f"prompt {prompt_id} has not ended after {timeout} s. The log:\n{self.log_tail()}")
            time.sleep(_POLL)

    def run(self, graph: Graph, timeout: float) -> History:
        """`submit`, then `wait`."""
        return self.wait(self.submit(graph), timeout)

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Cancel the running prompt, or only this one if it runs. Returns at once; the prompt ends when its node
        checks.
        """
        self._post("/interrupt", {} if prompt_id is None else {"prompt_id": prompt_id})

    def free(self) -> None:
        """Have ComfyUI unload models and empty its cache when no prompt runs, like the buttons in its frontend."""
        self._post("/free", {"unload_models": True, "free_memory": True})

    @contextmanager
    def listen(self) -> Iterator[Listener]:
        """Collect messages about prompts submitted here: progress, previews, errors. One listener at a time."""
        listener = Listener(f"ws://127.0.0.1:{self.port}/ws?clientId={self.client_id}")
        try:
            yield listener
        finally:
            listener.close()

    def output_files(self, history: History, node: str | None = None) -> list[Path]:
        """Return the files that a prompt, or one node of it, wrote."""
        outputs = history.outputs.values() if node is None else [history.outputs.get(node, {})]
        items = [item for output in outputs for value in output.values() if isinstance(value, list) for item in value]
        # ComfyUI makes a directory "temp" in the one for temporary files that it is given.
        roots = {"output": self.directory("output"), "temp": self.directory("temp") / "temp"}
        return [
            roots[item["type"]] / item.get("subfolder", "") / item["filename"]
            for item in items
            if isinstance(item, dict) and item.get("type") in roots and "filename" in item
        ]

    # -- inside -------------------------------------------------------------------------------------------------

    def _command(self) -> list[str]:
        command = [sys.executable, str(self.comfyui / "main.py"), "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--database-url", "sqlite:///:memory:", "--disable-auto-launch", "--disable-api-nodes"]
        for kind in ("output", "temp", "user", "input"):
            self.directory(kind).mkdir(parents=True, exist_ok=True)
            command += [f"--{kind}-directory", str(self.directory(kind))]
        if self._model_paths:
            config = self.work_dir / "extra_model_paths.yaml"
            paths = {kind: str(Path(path).absolute()) for kind, path in self._model_paths.items()}
            config.write_text(json.dumps({"raylight": paths}, ensure_ascii=False), "utf-8")  # JSON is YAML too
            command += ["--extra-model-paths-config", str(config)]
        if "--cpu" not in self._extra_args and not _has_cuda():
            command.append("--cpu")
        return command + self._extra_args

    def _wait_until_it_answers(self, deadline: float) -> None:
        while True:
            try:
                arguments = self._get("/system_stats")["system"]["argv"]
                # Another program may have taken the port since it was found free.
                if str(self.directory("user")) in arguments:
                    return
            except ConnectionError:
                pass
            if time.monotonic() > deadline:
                raise ComfyError(f"ComfyUI has not answered after {self._start_timeout} s. Its log:\n{self.log_tail()}")
            time.sleep(_POLL)

    def _get(self, path: str) -> dict[str, Any]:
        return self._request(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}"))

    def _post(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        url = f"http://127.0.0.1:{self.port}{path}"
        return self._request(urllib.request.Request(url, json.dumps(content).encode(), headers))

    def _request(self, request: urllib.request.Request) -> dict[str, Any]:
        """Send a request. Raises ComfyError: the process has ended. Raises ConnectionError: it runs but does not
        answer.
        """
        code = None if self._process is None else self._process.exit_code()
        if self._process is None or code is not None:
            raise ComfyError(f"ComfyUI is not running (exit code {code}). Its log:\n{self.log_tail()}")
        try:
            with self._opener.open(request, timeout=30.0) as response:
                body = response.read()
        except urllib.error.HTTPError as error:
            raise refusal(request, error) from error
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(f"ComfyUI does not answer {request.full_url}: {error}") from error
        return json.loads(body) if body else {}


@contextmanager
def _free_port() -> Iterator[int]:
    """Find a port of the loopback interface that is free, and keep it for a server that starts within the context.

    Seconds pass before that listens, in which the port might become that of some connection. A socket that is bound and
    does not listen keeps it from those, and lets in a server that reuses addresses, as asyncio's do on POSIX.
    """
    with socket.socket() as held:
        if os.name == "posix":
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        if os.name != "posix":
            held.close()
        yield port


def _has_cuda() -> bool:
    import torch  # here, because it takes seconds

    return torch.cuda.is_available()
