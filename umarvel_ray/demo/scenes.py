"""Scenes: a few coloured shapes on a two by two grid; how they are drawn, worded, altered and asked about.

Everything here is a pure function of its arguments. A scene is a meaning: another seed gives another drawing
or another wording of the same scene, never of another one. No two things of a scene share shape and colour,
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
                f"scene of {len(self.things)} things: {num_places} places and {num_names} pairs of colour and shape "
                f"(first thing: {self.things[:1]}). Give each thing a place and a name of its own."
            )


@dataclass(frozen=True, slots=True, order=True)
class Clue:
    """Two things of a scene and how they stand: a part of its meaning that a question can ask for.

    `relation` is "above", "left of" or "diagonal to", read from `first` to `second`; of the two ways to say the
    same, one is kept, so equal clues are equal objects.
    """

    first: tuple[str, str, str]
    relation: str
    second: tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Edit:
    """A modification in words, and the scene it leads to."""

    text: str
    scene: Scene


def random_scene(rng: random.Random, *, num_things: int) -> Scene:
    """A scene of 1 to 4 things, all attributes uniform."""
    names = rng.sample([(color, shape) for color in COLORS for shape in SHAPES], num_things)
    places = rng.sample(range(4), num_things)
    things = tuple(
        Thing(place, rng.choice(list(SIZES)), color, shape)
        for place, (color, shape) in zip(places, names, strict=True)
    )
    return Scene(things, rng.choice(list(GROUNDS)))


# ---- drawing ----------------------------------------------------------------------------------------------------


def draw(scene: Scene, *, seed: int, pixels: int) -> "Image":
    """One rendering: RGB, `pixels` × `pixels`. The seed moves, turns, scales and tints within what a scene allows."""
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


# ---- wording ----------------------------------------------------------------------------------------------------


def describe(scene: Scene, *, seed: int) -> str:
    """A caption that tells the whole scene: every thing with size, colour, shape and place, and the ground."""
    rng = random.Random(seed)
    body = rng.choice((_in_a_list, _place_first, _around_one, _row_by_row, _column_by_column))(scene, rng)
    ground = rng.choice(GROUNDS[scene.ground])
    form = rng.choice(
        (
            "{body} on a {ground} background",
            "{body}, all against a {ground} ground",
            "a {ground} picture: {body}",
            "on a {ground} ground, {body}",
        )
    )
    return _sentence(form.format(body=body, ground=ground))


def headline(scene: Scene, *, seed: int) -> str:
    """A short text that names two of the things (or the only one) and no place: part of the meaning."""
    rng = random.Random(seed)
    things = rng.sample(scene.things, min(2, len(scene.things)))
    form = rng.choice(("{things} seen together", "a picture with {things}", "here are {things}"))
    return _sentence(form.format(things=_joined([_a(thing, rng) for thing in things])))


def things_on(scene: Scene, side: str) -> tuple[Thing, ...]:
    """The things on one of `SIDES`, in the order of their places."""
    return tuple(thing for thing in scene.things if side in _sides_of(thing))


def describe_side(scene: Scene, side: str, *, seed: int) -> str:
    """A sentence that tells one side of the scene in full, and nothing of the rest.

    Raises:
        DataError: The side is empty.
    """
    rng = random.Random(seed)
    things = list(things_on(scene, side))
    if not things:
        raise DataError(
            f"scene with {len(scene.things)} things: its {side} side is empty. Ask for another side."
        )
    rng.shuffle(things)
    across = side in ("top", "bottom")
    parts = [
        f"{_a(thing, rng)} {_at_column(thing, rng) if across else _at_row(thing, rng)}" for thing in things
    ]
    words = {"top": ROWS[0], "bottom": ROWS[1], "left": COLUMNS[0], "right": COLUMNS[1]}[side]
    line = f"{rng.choice(words)} {'row' if across else 'column'}"
    form = rng.choice(
        ("the {line} shows {parts}", "in the {line} there is {parts}", "{parts}: this is the {line}")
    )
    return _sentence(form.format(line=line, parts=_joined(parts)))


def ask_side(side: str, *, seed: int) -> str:
    """A question for one of `SIDES`, by its name."""
    line = "row" if side in ("top", "bottom") else "column"
    forms = (
        f"What does this picture show on its {side} side?",
        f"What is in the {side} {line} of this picture?",
        f"Which things stand in the {side} {line}?",
    )
    return random.Random(seed).choice(forms)


def ask_beside(scene: Scene, side: str, *, seed: int) -> str:
    """A question for one of `SIDES`, by naming a thing that stands there: the picture must be looked at.

    Raises:
        DataError: The side is empty.
    """
    rng = random.Random(seed)
    things = things_on(scene, side)
    if not things:
        raise DataError(
            f"scene with {len(scene.things)} things: its {side} side is empty. Ask for another side."
        )
    line = "row" if side in ("top", "bottom") else "column"
    name = _named(rng.choice(things), rng)
    forms = (
        f"What is in the same {line} as {name}?",
        f"Which {line} holds {name}?",
        f"What shares a {line} with {name}?",
    )
    return rng.choice(forms)


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


def ask_clue(clue: Clue, *, seed: int) -> str:
    """A question that the scenes with this clue answer, and no others."""
    rng = random.Random(seed)
    first, second = (_noun(kind, rng) for kind in (clue.first, clue.second))
    there, back = {
        "above": (("above", "over"), ("below", "under")),
        "left of": (("to the left of", "left of"), ("to the right of", "right of")),
        "diagonal to": (("diagonally across from", "diagonally opposite"),) * 2,
    }[clue.relation]
    if rng.random() < 0.5:
        first, second, there = second, first, back
    form = rng.choice(
        ("which scene has a {} {} a {}?", "where is a {} {} a {}?", "find the scene with a {} {} a {}.")
    )
    return _sentence(form.format(first, rng.choice(there), second))


def _in_a_list(scene: Scene, rng: random.Random) -> str:
    return _joined([f"{_a(thing, rng)} {_at_place(thing, rng)}" for thing in _shuffled(scene.things, rng)])


def _place_first(scene: Scene, rng: random.Random) -> str:
    parts = [f"{_at_place(thing, rng)} {_a(thing, rng)}" for thing in _shuffled(scene.things, rng)]
    return _joined(parts)


def _around_one(scene: Scene, rng: random.Random) -> str:
    centre, *others = _shuffled(scene.things, rng)
    parts = [f"{_a(thing, rng)} {_from_it(centre, thing, rng)}" for thing in others]
    with_others = f", with {_joined(parts)}" if parts else ""
    return f"{_a(centre, rng)} {_at_place(centre, rng)}{with_others}"


def _row_by_row(scene: Scene, rng: random.Random) -> str:
    lines = []
    for row in (0, 1):
        things = [thing for thing in scene.things if thing.row == row]
        if things:
            parts = [f"{_a(thing, rng)} {_at_column(thing, rng)}" for thing in _shuffled(things, rng)]
            lines.append(f"the {rng.choice(ROWS[row])} row has {_joined(parts)}")
    return "; ".join(_shuffled(lines, rng))


def _column_by_column(scene: Scene, rng: random.Random) -> str:
    lines = []
    for column in (0, 1):
        things = [thing for thing in scene.things if thing.column == column]
        if things:
            parts = [f"{_a(thing, rng)} {_at_row(thing, rng)}" for thing in _shuffled(things, rng)]
            lines.append(f"the {rng.choice(COLUMNS[column])} column has {_joined(parts)}")
    return "; ".join(_shuffled(lines, rng))


def _noun(kind: tuple[str, str, str], rng: random.Random) -> str:
    """Size first, so that the article before it is always "a"."""
    size, color, shape = kind
    size, color, shape = rng.choice(SIZES[size]), rng.choice(COLORS[color]), rng.choice(SHAPES[shape])
    return f"{size} {color} {shape}" if rng.random() < 0.75 else f"{size} {shape} in {color}"


def _a(thing: Thing, rng: random.Random) -> str:
    return f"a {_noun(thing.kind, rng)}"


def _named(thing: Thing, rng: random.Random) -> str:
    """Colour and shape suffice to tell a thing of a scene from the others."""
    return f"the {rng.choice(COLORS[thing.color])} {rng.choice(SHAPES[thing.shape])}"


def _at_place(thing: Thing, rng: random.Random) -> str:
    row, column = rng.choice(ROWS[thing.row]), rng.choice(COLUMNS[thing.column])
    return rng.choice((f"at the {row} {column}", f"in the {row} {column} corner", f"{row} {column}"))


def _at_row(thing: Thing, rng: random.Random) -> str:
    return rng.choice(("at the top", "higher up") if thing.row == 0 else ("at the bottom", "lower down"))


def _at_column(thing: Thing, rng: random.Random) -> str:
    column = COLUMNS[thing.column][0]
    return rng.choice((f"on the {column}", f"at the {column} end"))


def _from_it(centre: Thing, thing: Thing, rng: random.Random) -> str:
    if thing.column == centre.column:
        return rng.choice(("below it", "under it") if thing.row > centre.row else ("above it", "over it"))
    if thing.row == centre.row:
        side = COLUMNS[thing.column][0]
        return rng.choice((f"to its {side}", f"{side} of it"))
    return rng.choice(("diagonally across from it", "diagonally opposite it"))


def _sides_of(thing: Thing) -> tuple[str, str]:
    return ("top", "bottom")[thing.row], ("left", "right")[thing.column]


def _shuffled(items: Sequence, rng: random.Random) -> list:
    return rng.sample(list(items), len(items))


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _sentence(text: str) -> str:
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else f"{text}."


# ---- altering ---------------------------------------------------------------------------------------------------


def near_misses(
    scene: Scene, rng: random.Random, *, count: int, accept: Callable[[Scene], bool] | None = None
) -> list[Scene]:
    """Different scenes that are easily taken for this one, hardest kinds as often as the others.

    Half of the draws change one attribute of one thing; the other half let two things trade one, so that the same
    words tell both scenes and only what goes with what differs.

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
    return _with(scene, {index: new})


def _trade(scene: Scene, rng: random.Random) -> Scene:
    one, two = rng.sample(range(len(scene.things)), 2)
    attribute = rng.choice(("color", "shape", "size", "place"))
    first, second = scene.things[one], scene.things[two]
    return _with(
        scene,
        {
            one: replace(first, **{attribute: getattr(second, attribute)}),
            two: replace(second, **{attribute: getattr(first, attribute)}),
        },
    )


def _with(scene: Scene, changed: dict[int, Thing]) -> Scene:
    return Scene(tuple(changed.get(n, thing) for n, thing in enumerate(scene.things)), scene.ground)


def edit(scene: Scene, rng: random.Random) -> Edit:
    """A modification sentence such as "Make the red circle blue.", and its result, which always differs."""
    makers = [_recolor, _reshape, _resize, _swap] if len(scene.things) > 1 else [_recolor, _reshape, _resize]
    if len(scene.things) < 4:
        makers += [_move, _add]
    if len(scene.things) > 2:
        makers.append(_remove)
    while True:
        try:
            made = rng.choice(makers)(scene, rng)
        except DataError:  # two things would bear one name
            continue
        if made.scene != scene:
            return Edit(_sentence(made.text), made.scene)


def edit_twice(scene: Scene, rng: random.Random) -> Edit:
    """Two modifications in one sentence, the second of what the first has made; the result differs from both."""
    while True:
        first = edit(scene, rng)
        second = edit(first.scene, rng)
        if second.scene != scene:
            text = f"{first.text.rstrip('.')}, then {second.text[0].lower()}{second.text[1:]}"
            return Edit(text, second.scene)


def _recolor(scene: Scene, rng: random.Random) -> Edit:
    index = rng.randrange(len(scene.things))
    color = rng.choice(list(COLORS))
    name, word = _named(scene.things[index], rng), rng.choice(COLORS[color])
    text = rng.choice((f"make {name} {word}", f"paint {name} {word}", f"{name} should be {word}"))
    return Edit(text, _with(scene, {index: replace(scene.things[index], color=color)}))


def _reshape(scene: Scene, rng: random.Random) -> Edit:
    index = rng.randrange(len(scene.things))
    shape = rng.choice(list(SHAPES))
    name, word = _named(scene.things[index], rng), rng.choice(SHAPES[shape])
    text = rng.choice((f"turn {name} into a {word}", f"{name} should become a {word}"))
    return Edit(text, _with(scene, {index: replace(scene.things[index], shape=shape)}))


def _resize(scene: Scene, rng: random.Random) -> Edit:
    index = rng.randrange(len(scene.things))
    size = "large" if scene.things[index].size == "small" else "small"
    name, word = _named(scene.things[index], rng), rng.choice(SIZES[size])
    text = rng.choice((f"make {name} {word}", f"{name} should be {word}"))
    return Edit(text, _with(scene, {index: replace(scene.things[index], size=size)}))


def _move(scene: Scene, rng: random.Random) -> Edit:
    index = rng.randrange(len(scene.things))
    moved = replace(
        scene.things[index], place=rng.choice(sorted(set(range(4)) - {thing.place for thing in scene.things}))
    )
    row, column = rng.choice(ROWS[moved.row]), rng.choice(COLUMNS[moved.column])
    text = rng.choice(("move {} to the {} {}", "put {} in the {} {} corner")).format(
        _named(moved, rng), row, column
    )
    return Edit(text, _with(scene, {index: moved}))


def _swap(scene: Scene, rng: random.Random) -> Edit:
    one, two = rng.sample(range(len(scene.things)), 2)
    first, second = scene.things[one], scene.things[two]
    form = rng.choice(("swap {} and {}", "let {} and {} trade places"))
    after = {one: replace(first, place=second.place), two: replace(second, place=first.place)}
    return Edit(form.format(_named(first, rng), _named(second, rng)), _with(scene, after))


def _add(scene: Scene, rng: random.Random) -> Edit:
    place = rng.choice(sorted(set(range(4)) - {thing.place for thing in scene.things}))
    thing = Thing(place, rng.choice(list(SIZES)), rng.choice(list(COLORS)), rng.choice(list(SHAPES)))
    text = f"{rng.choice(('add', 'place'))} {_a(thing, rng)} {_at_place(thing, rng)}"
    return Edit(text, Scene((*scene.things, thing), scene.ground))


def _remove(scene: Scene, rng: random.Random) -> Edit:
    index = rng.randrange(len(scene.things))
    text = f"{rng.choice(('remove', 'take away', 'erase'))} {_named(scene.things[index], rng)}"
    return Edit(text, Scene(scene.things[:index] + scene.things[index + 1 :], scene.ground))
