"""The drafted plans of one model that were proven, kept in ComfyUI's user folder for later sessions.

A proof holds for the model's class, the sources of its modules, its configuration, and the releases of ComfyUI, PyTorch
and Raylight: all are part of the key, so that a change of any of them asks for another proof.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from comfy.model_base import BaseModel
from comfyui_version import __version__ as comfyui_version
from torch import nn

from raylight import __version__
from raylight.parallel.plan import SequencePlan
from raylight.plans.draft.text import from_data, to_data
from raylight.plans.exceptions import EXCEPTIONS

from .proving import Way

logger = logging.getLogger(__name__)

_FORMAT = 2  # of the file, and of what this version of Raylight drafts and proves
_FILE = "drafted_plans.json"


class DraftedPlans:
    """The proven ways of one model, by what they are proven for."""

    def __init__(self, base: BaseModel, file: Path | None = None) -> None:
        """Read what is known: rank 0 reads `file`, or that in ComfyUI's user folder, for all. Collective."""
        kind = type(base.diffusion_model)
        config = type(base.model_config).__name__
        self.model = f"{kind.__module__}.{kind.__qualname__}"
        self.name = kind.__name__
        self.reason = EXCEPTIONS.get(config, "")
        # A proof repeats forwards, which a model that keeps state between them may not stand.
        self.refused = f"{self.name} cannot be split over workers: {self.reason}" if self.reason else ""
        self._file = file or _user_file()
        self._key = _key(base.diffusion_model, config, base.model_config.unet_config)
        self._plans: list[SequencePlan] = []
        self._proven: dict[str, int] = {}
        self._read()

    def known(self) -> list[SequencePlan]:
        """Return the plans that were proven for forwards of some sizes."""
        return list(self._plans)

    def proven(self, forward: Any) -> Way | None:
        """Return the way that is proven for forwards like this one, None if there is none."""
        number = self._proven.get(_digest(forward))
        return None if number is None else Way(self._plans[number])

    def remember(self, forward: Any, plan: SequencePlan) -> None:
        """Keep a plan that is proven for forwards like this one; rank 0 writes it."""
        if plan not in self._plans:
            self._plans.append(plan)
        self._proven[_digest(forward)] = self._plans.index(plan)
        if dist.get_rank() == 0:
            self._write()

    def _read(self) -> None:
        entry: list[Any] = [None]
        if dist.get_rank() == 0:
            entry[0] = _load(self._file).get(self._key)
        dist.broadcast_object_list(entry, src=0, device=torch.device("cpu"))
        if not entry[0]:
            return
        try:
            self._plans = [from_data(plan) for plan in entry[0]["plans"]]
            self._proven = {digest: int(number) for digest, number in entry[0]["proven"].items()}
            if any(not 0 <= number < len(self._plans) for number in self._proven.values()):
                raise ValueError("a proof of a plan that is not there")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s has no valid plan for %s (%s): it is drafted again", self._file, self.name, error)
            self._plans, self._proven = [], {}

    def _write(self) -> None:
        """Write the file, beside what others have written there. A folder that cannot be written to is logged."""
        content = _load(self._file)
        content[self._key] = {"plans": [to_data(plan) for plan in self._plans], "proven": self._proven}
        own = self._file.with_suffix(f".{os.getpid()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            own.write_text(json.dumps(content, indent=1), "utf-8")
            own.replace(self._file)
        except OSError as error:
            logger.warning("the plan for %s is not kept for later sessions: %s", self.name, error)


def _user_file() -> Path:
    import folder_paths  # only now: workers set its folders after they have imported Raylight

    # ComfyUI serves no folder of this form to browsers.
    return Path(folder_paths.get_user_directory(), "__raylight", _FILE)


def _load(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read: %s", file, error)
        return {}
    return content if isinstance(content, dict) else {}


def _key(model: nn.Module, config: str, settings: Mapping[str, Any]) -> str:
    """Return what a proof holds for, in words and a digest of the rest."""
    names = {one.__module__ for module in model.modules() for one in type(module).__mro__}
    files = {getattr(sys.modules.get(name), "__file__", None) for name in names if not name.startswith("torch")}
    code = sorted(hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files if file and _is_source(file))
    rest = _digest((code, sorted((str(name), repr(value)) for name, value in settings.items())))
    release = f"ComfyUI {comfyui_version}, PyTorch {torch.__version__}, Raylight {__version__}, drafts {_FORMAT}"
    return f"{type(model).__module__}.{type(model).__qualname__}, {config}, {release}, {rest[:16]}"


def _is_source(file: str) -> bool:
    return file.endswith(".py") and os.path.isfile(file)


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:32]
