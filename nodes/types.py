"""The link types of saved workflows."""

from comfy_api.latest import io

CATEGORY = "Raylight"

RayActorsInit = io.Custom("RAY_ACTORS_INIT")
RayActors = io.Custom("RAY_ACTORS")
RayLora = io.Custom("RAY_LORA")
