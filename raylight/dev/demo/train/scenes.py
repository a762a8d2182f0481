"""The pictures that the demo's model learns: one colored thing in a landscape, and its prompt."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIZE = 128
HORIZON = 80
_SCALE = 3  # drawn larger and reduced, so that edges are smooth

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (216, 44, 44),
    "orange": (242, 138, 28),
    "yellow": (250, 214, 40),
    "green": (40, 158, 62),
    "blue": (38, 96, 222),
    "purple": (138, 62, 190),
    "pink": (248, 128, 182),
    "white": (246, 246, 246),
}
PLACES = {"meadow": "in a meadow", "desert": "in the desert", "snow": "in the snow", "sea": "on the sea"}
TIMES = {"day": "by day", "sunset": "at sunset", "night": "at night"}
LAND = ("meadow", "desert", "snow")
LEFT_RIGHT, LIGHT_LEFT_RIGHT = (52.0, 76.0), (20.0, 108.0)
THINGS = {"house": LAND, "car": LAND, "tree": LAND, "boat": ("sea",), "balloon": tuple(PLACES)}

_GROUND: dict[str, Colour] = {
    "meadow": (112, 190, 84),
    "desert": (232, 202, 140),
    "snow": (236, 242, 250),
    "sea": (44, 122, 190),
}
_SKY: tuple[dict[str, Colour], dict[str, Colour]] = (
    {  # at the top, at the horizon
        "day": (92, 170, 240),
        "sunset": (108, 70, 150),
        "night": (10, 14, 48),
    },
    {"day": (206, 234, 252), "sunset": (255, 170, 90), "night": (48, 58, 116)},
)
_LIGHT = {"day": (1.0, 1.0, 1.0), "sunset": (0.97, 0.87, 0.85), "night": (0.58, 0.60, 0.78)}
_STARS = ((9, 12), (27, 30), (44, 8), (58, 24), (71, 10), (86, 33), (97, 6), (113, 21), (121, 40), (17, 47), (64, 42))


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows, and where, in pixels of the finished picture."""

    colour: str
    thing: str
    place: str
    time: str
    x: float = LEFT_RIGHT[0]
    light_x: float = LIGHT_LEFT_RIGHT[1]

    def prompt(self, place: bool = True, time: bool = True) -> str:
        """Return the prompt as a user would type it; what it leaves out can be anything."""
        parts = [f"a {self.colour} {self.thing}", PLACES[self.place] if place else "", TIMES[self.time] if time else ""]
        return " ".join(part for part in parts if part)


def draw_scene(generator: random.Random) -> Scene:
    """Return a random scene, with the thing and the sun or moon at the left or right."""
    thing = generator.choice(list(THINGS))
    return Scene(
        colour=generator.choice(list(COLOURS)),
        thing=thing,
        place=generator.choice(THINGS[thing]),
        time=generator.choice(list(TIMES)),
        x=generator.choice(LEFT_RIGHT),
        light_x=generator.choice(LIGHT_LEFT_RIGHT),
    )


def render(scene: Scene) -> Image.Image:
    """Return the picture of a scene, SIZE by SIZE, RGB."""
    picture = Image.new("RGB", (SIZE * _SCALE, SIZE * _SCALE))
    brush = _Brush(ImageDraw.Draw(picture), _LIGHT[scene.time])
    _sky(brush, scene)
    _ground(brush, scene)
    _DRAW[scene.thing](brush, scene)
    return picture.reduce(_SCALE)


class _Brush:
    """Draw shapes in pixels of the finished picture, in the light of the hour unless they glow."""

    def __init__(self, draw: ImageDraw.ImageDraw, light: tuple[float, float, float]) -> None:
        self._draw, self._light = draw, light

    def _fill(self, colour: Colour, shines: bool) -> Colour:
        return colour if shines else tuple(round(c * part) for c, part in zip(colour, self._light, strict=True))

    def polygon(self, points: list[tuple[float, float]], colour: Colour, shines: bool = False) -> None:
        self._draw.polygon([(x * _SCALE, y * _SCALE) for x, y in points], self._fill(colour, shines))

    def box(
        self,
        left: float,
        top: float,
        right: float,
        bottom: float,
        colour: Colour,
        shines: bool = False,
        radius: float = 0.0,
    ) -> None:
        corners = [edge * _SCALE for edge in (left, top, right, bottom)]
        self._draw.rounded_rectangle(corners, radius * _SCALE, self._fill(colour, shines))

    def circle(
        self, x: float, y: float, radius: float, colour: Colour, shines: bool = False, height: float | None = None
    ) -> None:
        height = radius if height is None else height
        corners = [edge * _SCALE for edge in (x - radius, y - height, x + radius, y + height)]
        self._draw.ellipse(corners, self._fill(colour, shines))


def _sky(brush: _Brush, scene: Scene) -> None:
    top, bottom = _SKY[0][scene.time], _SKY[1][scene.time]
    for y in range(HORIZON + 2):
        part = min(1.0, y / HORIZON)
        colour = tuple(round(a + (b - a) * part) for a, b in zip(top, bottom, strict=True))
        brush.box(0, y, SIZE, y + 1, colour, shines=True)
    if scene.time == "night":
        for x, y in _STARS:
            brush.circle(x, y, 0.9, (240, 240, 220), shines=True)
        brush.circle(scene.light_x, 20, 9, (244, 240, 206), shines=True)
    elif scene.time == "sunset":
        brush.circle(scene.light_x, HORIZON - 5, 13, (255, 92, 44), shines=True)
    else:
        brush.circle(scene.light_x, 20, 11, (255, 226, 70), shines=True)


def _ground(brush: _Brush, scene: Scene) -> None:
    brush.box(0, HORIZON, SIZE, SIZE, _GROUND[scene.place])
    if scene.place == "sea":
        for row, y in enumerate(range(HORIZON + 8, SIZE, 9)):
            for x in range(-10 + 14 * (row % 2), SIZE, 28):
                brush.box(x, y, x + 12, y + 1.6, (150, 204, 236), radius=0.8)
    elif scene.place == "meadow":
        brush.box(0, HORIZON, SIZE, HORIZON + 5, (86, 160, 66))
    elif scene.place == "desert":
        brush.circle(26, HORIZON + 8, 44, (214, 178, 112), height=14)
        brush.box(0, HORIZON + 8, SIZE, SIZE, _GROUND["desert"])
    else:
        brush.polygon([(70, HORIZON), (98, HORIZON - 22), (126, HORIZON)], (170, 184, 206))
        brush.polygon([(89, HORIZON - 15), (98, HORIZON - 22), (107, HORIZON - 15)], (244, 248, 255))


def _house(brush: _Brush, scene: Scene) -> None:
    x, base, colour = scene.x, HORIZON + 26, COLOURS[scene.colour]
    lamp = (255, 220, 110) if scene.time == "night" else (178, 218, 244)
    brush.box(x + 11, base - 62, x + 18, base - 40, (120, 74, 62))
    brush.box(x - 26, base - 38, x + 26, base, colour)
    brush.polygon([(x - 32, base - 38), (x, base - 64), (x + 32, base - 38)], (98, 62, 56))
    brush.box(x - 6, base - 22, x + 6, base, (92, 60, 44))
    for side in (-1, 1):
        middle = x + side * 16
        brush.box(middle - 6, base - 29, middle + 6, base - 17, (255, 255, 255))
        brush.box(middle - 5, base - 28, middle + 5, base - 18, lamp, shines=scene.time == "night")


def _car(brush: _Brush, scene: Scene) -> None:
    x, base, colour = scene.x, HORIZON + 26, COLOURS[scene.colour]
    brush.polygon([(x - 22, base - 20), (x - 14, base - 36), (x + 12, base - 36), (x + 24, base - 20)], colour)
    brush.polygon([(x - 17, base - 21), (x - 11, base - 33), (x - 2, base - 33), (x - 2, base - 21)], (186, 222, 244))
    brush.polygon([(x + 2, base - 21), (x + 2, base - 33), (x + 10, base - 33), (x + 19, base - 21)], (186, 222, 244))
    brush.box(x - 36, base - 22, x + 38, base - 6, colour, radius=5)
    brush.circle(x + 35, base - 16, 2.6, (255, 244, 170), shines=True)
    for side in (-1, 1):
        brush.circle(x + side * 20, base - 5, 8.5, (34, 34, 38))
        brush.circle(x + side * 20, base - 5, 3.6, (196, 196, 200))


def _tree(brush: _Brush, scene: Scene) -> None:
    x, base, colour = scene.x, HORIZON + 26, COLOURS[scene.colour]
    brush.polygon([(x - 5, base), (x - 3, base - 40), (x + 3, base - 40), (x + 5, base)], (112, 72, 44))
    for dx, dy, radius in ((-14, -44, 16), (14, -44, 16), (0, -62, 19), (0, -44, 16)):
        brush.circle(x + dx, base + dy, radius, colour)


def _boat(brush: _Brush, scene: Scene) -> None:
    x, base, colour = scene.x, HORIZON + 18, COLOURS[scene.colour]
    brush.box(x - 2, base - 66, x + 1, base - 12, (104, 70, 48))
    brush.polygon([(x + 3, base - 62), (x + 3, base - 20), (x + 32, base - 20)], (250, 244, 226))
    brush.polygon([(x - 4, base - 54), (x - 4, base - 20), (x - 26, base - 20)], (226, 218, 196))
    brush.polygon([(x - 38, base - 14), (x + 40, base - 14), (x + 26, base + 4), (x - 26, base + 4)], colour)


def _balloon(brush: _Brush, scene: Scene) -> None:
    x, y, colour = scene.x, HORIZON - 38, COLOURS[scene.colour]
    pale = tuple(round(c + (255 - c) * 0.45) for c in colour) if scene.colour != "white" else (206, 208, 216)
    brush.polygon([(x - 20, y + 17), (x + 20, y + 17), (x + 6, y + 38), (x - 6, y + 38)], colour)
    brush.circle(x, y, 27, colour)
    brush.circle(x, y, 10, pale, height=27)
    brush.box(x - 6, y + 42, x + 6, y + 51, (128, 84, 50), radius=1.5)


_DRAW = {"house": _house, "car": _car, "tree": _tree, "boat": _boat, "balloon": _balloon}
