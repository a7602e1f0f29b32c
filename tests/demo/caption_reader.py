"""Reads captions and questions back into what they mean: an independent answer for their tests."""

import re

from umarvel_ray.demo.scenes import COLORS, GROUNDS, SHAPES, SIZES, Scene, Thing


def _any(table: dict[str, tuple[str, ...]]) -> str:
    return "|".join(word for words in table.values() for word in words)


def _meaning(table: dict[str, tuple[str, ...]], word: str) -> str:
    (name,) = (name for name, words in table.items() if word in words)
    return name


_NOUN = re.compile(
    rf"a (?P<size>{_any(SIZES)}) (?:(?P<color>{_any(COLORS)}) (?P<shape>{_any(SHAPES)})"
    rf"|(?P<shape2>{_any(SHAPES)}) in (?P<color2>{_any(COLORS)}))\b"
)
_CORNER = re.compile(r"\b(top|upper|bottom|lower) (left|right)\b")
_LINE = re.compile(r"the (top|upper|bottom|lower|left|right) (?:row|column) has")
_TOP, _LEFT = ("top", "upper", "higher"), ("left",)


def read_kinds(text: str) -> list[tuple[str, str, str]]:
    """(size, colour, shape) of every thing named, in order."""
    return [
        (
            _meaning(SIZES, match["size"]),
            _meaning(COLORS, match["color"] or match["color2"]),
            _meaning(SHAPES, match["shape"] or match["shape2"]),
        )
        for match in _NOUN.finditer(text.lower())
    ]


def read_caption(text: str) -> Scene:
    """The scene that a caption tells."""
    text = text.lower()
    (ground,) = {word for word in re.findall(r"\w+", text) if word in ("light", "pale", "dark", "dim")}
    nouns = list(_NOUN.finditer(text))
    ends = [match.start() for match in nouns[1:]] + [len(text)]
    after = [text[match.end() : end] for match, end in zip(nouns, ends, strict=True)]
    corners = [_place(row in _TOP, column in _LEFT) for row, column in _CORNER.findall(text)]
    lines = list(_LINE.finditer(text))
    if lines:
        places = []
        for match, tail in zip(nouns, after, strict=True):
            line = [found[1] for found in lines if found.start() < match.start()][-1]
            tail = tail.split(";")[0]
            if line in ("left", "right"):
                places.append(_place(re.search(r"top|higher", tail) is not None, line == "left"))
            else:
                places.append(_place(line in _TOP, re.search(r"\bleft\b", tail) is not None))
    elif len(corners) == len(nouns):
        places = corners
    else:
        (corner,) = corners
        places = [corner, *(_seen_from(corner, tail) for tail in after[1:])]
    kinds = read_kinds(text)
    things = [Thing(place, *kind) for place, kind in zip(places, kinds, strict=True)]
    return Scene(tuple(things), _meaning(GROUNDS, ground))


def answers(question: str, scene: Scene) -> bool:
    """Whether the scene has the two things of a question, standing as it says."""
    first, second = read_kinds(question)
    for one in scene.things:
        for two in scene.things:
            if (one.kind, two.kind) == (first, second):
                across, down = two.column - one.column, two.row - one.row
                if "diagonally" in question:
                    return bool(across and down)
                for words, step in (
                    ("above|over", (0, 1)),
                    ("below|under", (0, -1)),
                    ("left of", (1, 0)),
                    ("right of", (-1, 0)),
                ):
                    if re.search(rf"\b({words})\b", question):
                        return (across, down) == step
    return False


def _place(is_top: bool, is_left: bool) -> int:
    return 2 * (not is_top) + (not is_left)


def _seen_from(corner: int, words: str) -> int:
    row, column = divmod(corner, 2)
    if "diagonally" in words:
        return 2 * (1 - row) + (1 - column)
    if re.search(r"\b(below|under|above|over)\b", words):
        assert (row == 0) == (re.search(r"\b(below|under)\b", words) is not None)
        return 2 * (1 - row) + column
    assert (column == 0) == (re.search(r"\bright\b", words) is not None)
    return 2 * row + 1 - column
