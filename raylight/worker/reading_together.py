"""Whether the ranks read weights together, each a part of the file, or each all of it by itself.

They read together if all of them are to have the same weights, whole, at the same moment, and if the link is faster
than the file. They agree on that once in each `partially_load`, whatever a rank does in it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

from raylight.cluster.errors import is_out_of_memory
from raylight.host.log_messages import gb
from raylight.parallel import bandwidth
from raylight.parallel.process_group import agreeing_group, alike
from raylight.sharding.shared_read import SharedRead
from raylight.sharding.staged_read import Copy

logger = logging.getLogger(__name__)

# Measured: what a rank reads from memory of the system while others read too. Below it the link would hold up.
FILE_BYTES_PER_S = 7e9

_pending: list[bool] = []  # for each `partially_load` that runs: whether this rank has yet to agree in it


def _why_alone() -> str:
    """Return why ranks read by themselves because of their links, "" if these are fast. The same on all ranks."""
    slowest = bandwidth.slowest_in_use()
    if not slowest:
        return "the links between the workers were not measured"
    if slowest < FILE_BYTES_PER_S:
        return f"the slowest link between workers has {slowest / 1e9:.1f} GB/s, and the file more"
    return ""


@contextmanager
def agreed_once() -> Iterator[None]:
    """Have this rank agree once within this context: in `read_together`, or else at its end that it does not read.

    Collective, where ranks may read together at all.
    """
    _pending.append(not _why_alone() and _ranks() > 1)
    try:
        yield
        decline()
    except BaseException:
        with suppress(RuntimeError):  # if others have ended, this rank's own error is the cause that counts
            decline()
        raise
    finally:
        _pending.pop()


def decline() -> None:
    """Agree that this rank does not read all weights now. Does nothing if it has agreed already. Collective."""
    if _pending and _pending[-1]:
        _agree(0)


def read_together(copies: Sequence[Copy], names: Sequence[str], device: torch.device, what: str) -> bool:
    """Do all copies of one load together with the other ranks, if they are ready for the same. Return whether it is
    done. `names` are those of the weights, in order, and `what` that of the model. Collective.

    Raises ReadingStopped: on all ranks, when one was asked to cancel.
    """
    if not (_pending and _pending[-1]):
        if _pending and _ranks() > 1:
            _log_alone(what, _why_alone())
        return False
    try:
        together = SharedRead(copies, device, agreeing_group(), names)
        why = "a worker does not load all of it, or has no memory to exchange it"
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        together, why = None, "its GPU has no memory to exchange it"
    if not _agree(0 if together is None else together.fingerprint) or together is None:
        _log_alone(what, why)
        return False
    began = time.monotonic()
    together.run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = max(time.monotonic() - began, 1e-6)
    speed = together.nbytes / seconds / 1e9
    logger.info("%s of %s read together in %.2f s (%.1f GB/s)", gb(together.nbytes), what, seconds, speed)
    return True


def _agree(fingerprint: int) -> bool:
    """Return whether all ranks have the same fingerprint, and this context's agreement is done. Collective."""
    _pending[-1] = False
    return alike(fingerprint) and fingerprint != 0


def _ranks() -> int:
    return dist.get_world_size(agreeing_group()) if dist.is_initialized() else 1


def _log_alone(what: str, why: str) -> None:
    logger.info("each worker reads all of %s by itself: %s", what, why)
