"""The part of a job that describes its model."""

from __future__ import annotations

from collections.abc import Sequence

from raylight.cluster.session import Session
from raylight.host import torch_settings
from raylight.host.jobs import Inside, ModelJob
from raylight.host.patcher_state import Change
from raylight.host.pickling import NotSerializableError, serialize

from . import written_weights
from .injected_code import inside_of, warn_of_full_tokens
from .remote_model import RemotePatcher
from .short_of_memory import graphs_of, may_keep


def model_job(
    session: Session, patcher: RemotePatcher, changes: Sequence[Change], full_tokens_for: str = ""
) -> ModelJob:
    """Describe the model of a patcher as it is now, with what nodes have changed on the model itself. `full_tokens_for`
    is as in `Inside`, for code that is not there yet. Raises ValueError for patches of weights that cannot be sent.
    """
    patches = None
    written, content = written_weights.of(patcher.model)
    if patcher.patches or written:
        try:
            patches = session.shared.of(
                f"{patcher.patches_uuid}{content}",
                lambda: serialize((written, patcher.patches), patcher, foreign_code=True),
            )
        except NotSerializableError as error:
            raise ValueError(f"a patch of the model's weights cannot be sent to the workers: {error}") from error
    inside = Inside(full_tokens_for) if full_tokens_for else inside_of(patcher, changes)
    warn_of_full_tokens(inside, session.config.world_size)
    workers = patcher.workers
    return ModelJob(
        patcher.recipe,
        workers.attention,
        workers.strategy,
        patches,
        inside,
        graphs_of(patcher.recipe, workers.graphs),
        torch_settings.read(),
        patcher.load_device.type,
        may_keep(patcher.recipe),
    )
