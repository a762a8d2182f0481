"""See to it that each machine of a cluster has the files of a model: find them there, or send them once."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable

import numpy as np

from raylight.cluster.session import Session
from raylight.host import gguf, model_files
from raylight.host.log_messages import gb
from raylight.host.model_files import FoundFile, ModelFile
from raylight.host.recipe import ModelRecipe
from raylight.host.worker_service import WorkerService

from . import progress

logger = logging.getLogger(__name__)

_PART_BYTES = 64 << 20  # at a time in Ray's object stores
_MARGIN_BYTES = 1 << 30  # that stay free on a disk
# What the workers of a session are known to have: recipes without what does not change files.
_known: weakref.WeakKeyDictionary[Session, set[tuple[object, ...]]] = weakref.WeakKeyDictionary()


def ensure(session: Session, recipe: ModelRecipe, wants_cancel: Callable[[], bool]) -> None:
    """Have the workers of a cluster find the files of a recipe on their machines; send what a machine does not have.

    Raises ValueError: when a machine has another file under the name, or no room for it. Raises what `Session.run_all`
    raises, RunCancelled among them.
    """
    if session.config.is_local:
        return
    known, key = _known.setdefault(session, set()), (recipe.path, recipe.stamp, recipe.loras)
    if key in known:
        return
    try:
        files = [model_files.describe(path) for path in model_files.paths_of(recipe)]
        code = [model_files.describe(path) for path in gguf.code_of(recipe)]
    except FileNotFoundError as error:
        raise ValueError(f"the model file {error.filename} is not there any more") from error
    found_code = _look(session, code, wants_cancel) if code else []
    for file, found in zip(code, found_code, strict=True):
        _refuse_code(file, found)
    for file, found in zip(files, _look(session, files, wants_cancel), strict=True):
        lacking = {rank: one for rank, one in found.items() if not one.path}
        if lacking:
            _refuse(file, lacking)
            _send(session, file, lacking, wants_cancel)
    known.add(key)


def _look(session: Session, files: list[ModelFile], wants_cancel: Callable[[], bool]) -> list[dict[int, FoundFile]]:
    """Return for each file what the ranks' machines have of it."""
    answers = session.run_all(WorkerService.find_files, tuple(files), wants_cancel=wants_cancel)
    return [{rank: answer[index] for rank, answer in answers.items()} for index in range(len(files))]


def _refuse(file: ModelFile, lacking: dict[int, FoundFile]) -> None:
    """Raise ValueError if a machine cannot or must not get a file."""
    for found in lacking.values():
        if found.other:
            why = (
                f"has {found.other_size} bytes there, and {file.size} here"
                if found.other_size != file.size
                else "has the same size and other content"
            )
            raise ValueError(
                f"{file.name} on the machine {found.machine} is another file: {found.other} {why} ({file.path}). "
                f"Copy this one there, or rename or delete the other: then it is sent from here"
            )
        if found.free_bytes < file.size + _MARGIN_BYTES:
            raise ValueError(
                f"the machine {found.machine} does not have {file.name}, and no room for it: {gb(found.free_bytes)} "
                f"are free for {found.cache}, and {gb(file.size + _MARGIN_BYTES)} are needed. Free space there, put "
                f"the file into a model folder there, or start Ray there with {model_files.CACHE_VARIABLE} set to a "
                f"folder on another disk"
            )


def _refuse_code(file: ModelFile, found: dict[int, FoundFile]) -> None:
    """Raise ValueError if a machine does not have a module of ComfyUI-GGUF as ComfyUI has it: others may give other
    results, and code is not sent.
    """
    for one in found.values():
        if not one.path:
            folder = os.path.dirname(file.path)
            has = f"another version of ComfyUI-GGUF: {one.other} differs" if one.other else "no ComfyUI-GGUF"
            raise ValueError(
                f"the machine {one.machine} has {has}, and GGUF files need there what ComfyUI has in {folder}: copy "
                f"that folder into custom_nodes of ComfyUI there, under the name {os.path.basename(folder)}"
            )


def _send(session: Session, file: ModelFile, lacking: dict[int, FoundFile], wants_cancel: Callable[[], bool]) -> None:
    """Send a file to the machines of the ranks `lacking` it, to each once."""
    first = {found.machine: rank for rank, found in sorted(lacking.items(), reverse=True)}
    where = " and ".join(f"{lacking[rank].machine} ({lacking[rank].cache})" for rank in first.values())
    logger.info("%s is not there on %s: it is sent once, %s", file.name, where, gb(file.size))
    began = time.monotonic()
    for offset in range(0, file.size, _PART_BYTES):
        data = np.fromfile(file.path, np.uint8, min(_PART_BYTES, file.size - offset), offset=offset)
        ranks = frozenset(first.values())
        session.run_all(WorkerService.receive_file, file, offset, data, ranks, wants_cancel=wants_cancel)
        progress.show_text(f"Sending {file.name} to {where}: {100 * (offset + len(data)) // file.size} %")
    still = [one.machine for one in _look(session, [file], wants_cancel)[0].values() if not one.path]
    if still:
        raise ValueError(f"{file.name} was sent to {' and '.join(still)}, and is not there: run the prompt again")
    seconds = max(time.monotonic() - began, 1e-6)
    logger.info("%s is sent in %.1f s (%.2f GB/s)", file.name, seconds, file.size / seconds / 1e9)
