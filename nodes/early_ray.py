"""Start Ray when a workflow with this pack's nodes is opened, long before its prompt: `web/early_ray.js` asks for it.

The start of Ray and the imports that workers are forked with are most of what a first prompt would wait for. No GPU
memory is used before the prompt.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from aiohttp import web

from raylight.driver.options import config_from, config_of_all
from raylight.host.prompt_server import prompt_server

from .common import driver
from .initializer import RayInitializer, RayInitializerAdvanced

logger = logging.getLogger(__name__)

ROUTE = "/raylight/begin_ray"
_INITIALIZERS = {one.define_schema().node_id: one for one in (RayInitializer, RayInitializerAdvanced)}


def register() -> None:
    """Have ComfyUI's server answer at ROUTE: a POST of {"initializer": id or null, "inputs": its values by name}."""
    routes = getattr(prompt_server(), "routes", None)
    if routes is None:
        logger.debug("there is no server to ask for an early start of Ray")
    else:
        routes.post(ROUTE)(_on_post)


async def _on_post(request: web.Request) -> web.Response:
    asked = await request.json()
    # In a thread: the driver's imports take seconds.
    arguments = (asked.get("initializer"), asked.get("inputs") or {})
    threading.Thread(target=_begin, args=arguments, name="raylight-begin-ray", daemon=True).start()
    return web.Response(status=204)


def _begin(initializer: str | None, inputs: dict[str, Any]) -> None:
    try:
        node = _INITIALIZERS.get(initializer or "")
        config, _ = config_of_all() if node is None else config_from(node.defaults() | inputs)
        driver().begin_ray(config)
    except Exception as error:  # a node meets it too, and tells it to the user
        logger.debug("Ray was not started early: %s", error)
