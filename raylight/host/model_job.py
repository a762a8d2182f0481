"""The part of a job that says which model it is for."""

from __future__ import annotations

from raylight.cluster.session import Session

from .job import ModelJob
from .remote_patcher import RemotePatcher
from .travel import CannotTravel, send


def model_job(session: Session, patcher: RemotePatcher) -> ModelJob:
    """The model of a patcher as it is now. Raises ValueError for patches of weights that cannot be sent."""
    patches = None
    if patcher.patches:
        try:
            patches = session.shared.of(str(patcher.patches_uuid),
                                        lambda: send(patcher.patches, patcher, foreign_code=True))
        except CannotTravel as error:
            raise ValueError(f"a patch of the model's weights cannot be sent to the workers: {error}") from error
    return ModelJob(patcher.recipe, patcher.workers.attention, patcher.workers.strategy, patches)
