"""Scenes: a few coloured shapes on a two by two grid; how they are drawn, and which are easily confused.

Everything here is a pure function of its arguments. A scene is a meaning: another seed gives another drawing
of the same scene, never of another one. No two things of a scene share shape and colour,
so "the red circle" always names one of them.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING

from umarvel_ray.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SHAPES = {
    "circle": ("circle", "disc", "dot"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle", "wedge", "pyramid"),
    "diamond": ("diamond", "rhombus", "lozenge"),
    "star": ("star", "starlet"),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop", "loop"),
    "heart": ("heart", "valentine"),
}
"""Words for each shape; the same word never means two things, here and in the tables below."""

COLORS = {
    "red": ("red", "scarlet", "crimson"),
    "orange": ("orange", "tangerine"),
    "yellow": ("yellow", "golden", "lemon"),
    "green": ("green", "emerald"),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue", "cobalt"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rosy"),
}
SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
GROUNDS = {"light": ("light", "pale"), "dark": ("dark", "dim")}
ROWS = (("top", "upper"), ("bottom", "lower"))
COLUMNS = (("left",), ("right",))
SIDES = ("left", "right", "top", "bottom")
"""A side holds the two places of one column or one row."""

_RGB = {
    "red": (215, 40, 45),
    "orange": (240, 135, 30),
    "yellow": (235, 215, 60),
    "green": (45, 160, 70),
    "cyan": (60, 200, 205),
    "blue": (45, 80, 215),
    "purple": (135, 60, 175),
    "pink": (245, 150, 195),
}
_GROUND_RGB = {"light": (232, 232, 228), "dark": (48, 48, 54)}
_SUPERSAMPLING = 3


@dataclass(frozen=True, slots=True, order=True)
class Thing:
    """One shape of a scene; `place` counts the 2×2 grid row by row: 0 top left … 3 bottom right."""

    place: int
    size: str
    color: str
    shape: str

    @property
    def row(self) -> int:
        """0 top, 1 bottom."""
        return self.place // 2

    @property
    def column(self) -> int:
        """0 left, 1 right."""
        return self.place % 2

    @property
    def kind(self) -> tuple[str, str, str]:
        """What it is, wherever it stands."""
        return (self.size, self.color, self.shape)


@dataclass(frozen=True, slots=True)
class Scene:
    """Things in the order of their places, on a light or a dark ground.

    Raises:
        DataError: No things, two in one place, or two of the same colour and shape.
    """

    things: tuple[Thing, ...]
    ground: str = "light"

    def __post_init__(self) -> None:
        object.__setattr__(self, "things", tuple(sorted(self.things)))
        num_places = len({thing.place for thing in self.things})
        num_names = len({(thing.color, thing.shape) for thing in self.things})
        if not self.things or num_places < len(self.things) or num_names < len(self.things):
            raise DataError(
                f"scene of {len(self.things)} things: {num_places} places and {num_names} pairs of colour "
                f"and shape (first thing: {self.things[:1]}). Give each thing a place and a name of its own."
            )


@dataclass(frozen=True, slots=True, order=True)
class Clue:
    """Two things of a scene and how they stand: a part of its meaning that a question can ask for.

    `relation` is "above", "left of" or "diagonal to", read from `first` to `second`; of the two ways to say
    the same, one is kept, so equal clues are equal objects.
    """

    first: tuple[str, str, str]
    relation: str
    second: tuple[str, str, str]


def random_scene(rng: random.Random, *, num_things: int) -> Scene:
    """A scene of 1 to 4 things, all attributes uniform."""
    names = rng.sample([(color, shape) for color in COLORS for shape in SHAPES], num_things)
    places = rng.sample(range(4), num_things)
    things = tuple(
        Thing(place, rng.choice(list(SIZES)), color, shape)
        for place, (color, shape) in zip(places, names, strict=True)
    )
    return Scene(things, rng.choice(list(GROUNDS)))


def things_on(scene: Scene, side: str) -> tuple[Thing, ...]:
    """The things on one of `SIDES`, in the order of their places."""
    return tuple(thing for thing in scene.things if side in _sides_of(thing))


def _sides_of(thing: Thing) -> tuple[str, str]:
    return ("top", "bottom")[thing.row], ("left", "right")[thing.column]


def clues(scene: Scene) -> frozenset[Clue]:
    """All that can be said of two of its things; `clue in clues(scene)` is whether the scene answers it."""
    found = []
    for first, second in combinations(
        scene.things, 2
    ):  # in the order of places: top before bottom, left before right
        if first.column == second.column:
            found.append(Clue(first.kind, "above", second.kind))
        elif first.row == second.row:
            found.append(Clue(first.kind, "left of", second.kind))
        else:
            low, high = sorted((first.kind, second.kind))
            found.append(Clue(low, "diagonal to", high))
    return frozenset(found)


def near_misses(
    scene: Scene, rng: random.Random, *, count: int, accept: Callable[[Scene], bool] | None = None
) -> list[Scene]:
    """Different scenes that are easily taken for this one, hardest kinds as often as the others.

    Half of the draws change one attribute of one thing; the other half let two things trade one, so that the
    same words tell both scenes and only what goes with what differs.

    Args:
        accept: Further condition on a near miss.

    Raises:
        DataError: So many could not be found.
    """
    found: list[Scene] = []
    for _ in range(200 * count):
        if len(found) == count:
            return found
        try:
            other = (
                _trade(scene, rng) if len(scene.things) > 1 and rng.random() < 0.5 else _change(scene, rng)
            )
        except DataError:  # two things would bear one name
            continue
        if other != scene and other not in found and (accept is None or accept(other)):
            found.append(other)
    if len(found) == count:
        return found
    raise DataError(
        f"scene {scene.things}: {len(found)} of {count} near misses found. Ask for fewer or for less of each."
    )


def _change(scene: Scene, rng: random.Random) -> Scene:
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    attribute = rng.choice(("color", "shape", "size", "place"))
    if attribute == "place":
        free = sorted(set(range(4)) - {other.place for other in scene.things})
        new = replace(thing, place=rng.choice(free)) if free else thing
    else:
        values = {"color": COLORS, "shape": SHAPES, "size": SIZES}[attribute]
        new = replace(thing, **{attribute: rng.choice(list(values))})
    return replace_things(scene, {index: new})


def _trade(scene: Scene, rng: random.Random) -> Scene:
    one, two = rng.sample(range(len(scene.things)), 2)
    attribute = rng.choice(("color", "shape", "size", "place"))
    first, second = scene.things[one], scene.things[two]
    return replace_things(
        scene,
        {
            one: replace(first, **{attribute: getattr(second, attribute)}),
            two: replace(second, **{attribute: getattr(first, attribute)}),
        },
    )


def replace_things(scene: Scene, changed: dict[int, Thing]) -> Scene:
    """The scene with other things at these indices."""
    return Scene(tuple(changed.get(n, thing) for n, thing in enumerate(scene.things)), scene.ground)


def draw(scene: Scene, *, seed: int, pixels: int) -> "Image":
    """One rendering: RGB, `pixels` × `pixels`. The seed moves, turns, scales and tints as a scene allows."""
    from PIL import Image, ImageDraw

    rng = random.Random(seed)
    side = pixels * _SUPERSAMPLING
    ground = _tint(_GROUND_RGB[scene.ground], rng, 12)
    canvas = Image.new("RGB", (side, side), ground)
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        x = side * (0.25 + 0.5 * thing.column + rng.uniform(-0.04, 0.04))
        y = side * (0.25 + 0.5 * thing.row + rng.uniform(-0.04, 0.04))
        radius = side * (rng.uniform(0.095, 0.12) if thing.size == "small" else rng.uniform(0.17, 0.2))
        turn = rng.uniform(-0.22, 0.22)
        fill = _tint(_RGB[thing.color], rng, 16)
        if thing.shape in ("circle", "ring"):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
            if thing.shape == "ring":
                hole = 0.55 * radius
                pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=ground)
            continue
        cos, sin = radius * math.cos(turn), radius * math.sin(turn)
        pen.polygon(
            [(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in _outline(thing.shape)], fill=fill
        )
    return canvas.reduce(_SUPERSAMPLING)


def _tint(rgb: tuple[int, int, int], rng: random.Random, by: int) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, part + rng.randint(-by, by))) for part in rgb)
    return red, green, blue


@cache
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners on or inside the unit circle; y points down."""

    def around(count: int, radii: Sequence[float], start: float) -> tuple[tuple[float, float], ...]:
        steps = [(radii[n % len(radii)], start + 2 * math.pi * n / count) for n in range(count)]
        return tuple((radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in steps)

    if shape == "square":
        return around(4, (1.0,), math.pi / 4)
    if shape == "diamond":
        return tuple((0.72 * x, y) for x, y in around(4, (1.0,), 0.0))
    if shape == "triangle":
        return around(3, (1.0,), -math.pi / 2)
    if shape == "star":
        return around(10, (1.0, 0.42), -math.pi / 2)
    if shape == "cross":
        arm = 0.3
        quarter = ((arm, -arm), (arm, -1.0), (-arm, -1.0))
        corners = []
        for turn in range(4):  # the same three corners, a quarter turn at a time
            for x, y in quarter:
                for _ in range(turn):
                    x, y = y, -x
                corners.append((x, y))
        return tuple(corners)
    angles = [2 * math.pi * n / 24 for n in range(24)]
    return tuple(
        (
            math.sin(a) ** 3,
            -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 17,
        )
        for a in angles
    )
