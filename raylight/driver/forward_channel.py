"""What ComfyUI's process keeps between forwards that it sends one by one: what nodes have put into the model until the
run ends, and tensors until models are unloaded.
"""

from __future__ import annotations

import uuid
import weakref

from comfy.model_base import BaseModel

from raylight.cluster.session import Session
from raylight.cluster.tensor_delta import Sender
from raylight.host.jobs import ForwardJob
from raylight.host.recipe import ModelRecipe

from .forward_extras import SentExtras

FORWARD = "forward"
_KEPT_BYTES = 128 * 2**20


class ForwardChannel:
    """What is kept between the calls that are sent to one session."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.sender = Sender(uuid.uuid4().hex, _KEPT_BYTES)
        self.room: tuple[ModelRecipe, bool] | None = None  # ComfyUI made it last for a model, and to sample or not
        self.extras: SentExtras | None = None
        # Models whose weights were looked at in this run, which may call several.
        self.looked_at: weakref.WeakSet[BaseModel] = weakref.WeakSet()

    def has_room_for(self, job: ForwardJob) -> bool:
        """Return whether ComfyUI has made room for such a job in this run: of the same model, and to sample if it is a
        forward.
        """
        recipe = job.model.recipe
        return not job.begins_run and self.room in ((recipe, True), (recipe, job.method == FORWARD))


_channel: ForwardChannel | None = None


def current() -> ForwardChannel | None:
    """Return the channel that has begun, if its workers can be called."""
    return _channel if _channel is not None and _channel.session.alive else None


def begin(session: Session) -> ForwardChannel:
    """Begin a channel to workers, in the place of the one before."""
    global _channel
    _channel = ForwardChannel(session)
    return _channel


def end_run() -> None:
    """Let go what nodes have put into the model for a run."""
    if _channel is not None:
        _channel.extras = None


def drop() -> None:
    """Let go the channel, and all that it keeps."""
    global _channel
    _channel = None
