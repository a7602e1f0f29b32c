"""Scenes in words: captions, headlines, questions with their answers, and modifications.

Pure functions. Another seed gives other words, in another order, of the same meaning; the tables of words in
`scenes.py` and the patterns here never let one text tell two scenes.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from umarvel_ray.demo.scenes import (
    COLORS,
    COLUMNS,
    GROUNDS,
    ROWS,
    SHAPES,
    SIZES,
    Clue,
    Scene,
    Thing,
    replace_things,
    things_on,
)
from umarvel_ray.errors import DataError


@dataclass(frozen=True, slots=True)
class Edit:
    """A modification in words, and the scene it leads to."""

    text: str
    scene: Scene


def describe(scene: Scene, *, seed: int) -> str:
    """A caption that tells all of the scene: each thing's size, colour, shape and place, and the ground."""
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


def _shuffled(items: Sequence, rng: random.Random) -> list:
    return rng.sample(list(items), len(items))


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _sentence(text: str) -> str:
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else f"{text}."


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
    """Two modifications in one sentence, the second of what the first has made; never back to the start."""
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
    return Edit(text, replace_things(scene, {index: replace(scene.things[index], color=color)}))


def _reshape(scene: Scene, rng: random.Random) -> Edit:
    index = rng.randrange(len(scene.things))
    shape = rng.choice(list(SHAPES))
    name, word = _named(scene.things[index], rng), rng.choice(SHAPES[shape])
    text = rng.choice((f"turn {name} into a {word}", f"{name} should become a {word}"))
    return Edit(text, replace_things(scene, {index: replace(scene.things[index], shape=shape)}))


def _resize(scene: Scene, rng: random.Random) -> Edit:
    index = rng.randrange(len(scene.things))
    size = "large" if scene.things[index].size == "small" else "small"
    name, word = _named(scene.things[index], rng), rng.choice(SIZES[size])
    text = rng.choice((f"make {name} {word}", f"{name} should be {word}"))
    return Edit(text, replace_things(scene, {index: replace(scene.things[index], size=size)}))


def _move(scene: Scene, rng: random.Random) -> Edit:
    index = rng.randrange(len(scene.things))
    moved = replace(
        scene.things[index], place=rng.choice(sorted(set(range(4)) - {thing.place for thing in scene.things}))
    )
    row, column = rng.choice(ROWS[moved.row]), rng.choice(COLUMNS[moved.column])
    text = rng.choice(("move {} to the {} {}", "put {} in the {} {} corner")).format(
        _named(moved, rng), row, column
    )
    return Edit(text, replace_things(scene, {index: moved}))


def _swap(scene: Scene, rng: random.Random) -> Edit:
    one, two = rng.sample(range(len(scene.things)), 2)
    first, second = scene.things[one], scene.things[two]
    form = rng.choice(("swap {} and {}", "let {} and {} trade places"))
    after = {one: replace(first, place=second.place), two: replace(second, place=first.place)}
    return Edit(form.format(_named(first, rng), _named(second, rng)), replace_things(scene, after))


def _add(scene: Scene, rng: random.Random) -> Edit:
    place = rng.choice(sorted(set(range(4)) - {thing.place for thing in scene.things}))
    thing = Thing(place, rng.choice(list(SIZES)), rng.choice(list(COLORS)), rng.choice(list(SHAPES)))
    text = f"{rng.choice(('add', 'place'))} {_a(thing, rng)} {_at_place(thing, rng)}"
    return Edit(text, Scene((*scene.things, thing), scene.ground))


def _remove(scene: Scene, rng: random.Random) -> Edit:
    index = rng.randrange(len(scene.things))
    text = f"{rng.choice(('remove', 'take away', 'erase'))} {_named(scene.things[index], rng)}"
    return Edit(text, Scene(scene.things[:index] + scene.things[index + 1 :], scene.ground))
