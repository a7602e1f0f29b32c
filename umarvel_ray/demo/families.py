"""The families of scenes of each task: what its candidates hold, and how queries ask for them.

A family is one meaning that is asked for and others that are easily taken for it. A `Deck` deals each scene
once in the whole world.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from umarvel_ray.demo import scenes, wording
from umarvel_ray.demo.scenes import Clue, Scene, Thing


@dataclass(frozen=True, slots=True)
class Content:
    """What a record holds: a scene to draw, a text by seed, or both."""

    picture: Scene | None = None
    text: Callable[[int], str] | None = None
    as_asked: bool = False
    """Take the very file that queries show: CIRR's pools hold the reference pictures."""


@dataclass(frozen=True, slots=True)
class Target:
    """One meaning in a pool, and how to ask for it; without a question it is there to mislead."""

    answer: Content
    question: Content | None = None


class Deck:
    """Scenes, each dealt once in the whole world, so that a meaning belongs to one family and one split.

    `taken` is shared by the decks of all splits. Within a deck, a clue that was asked for and a side that was
    told belong to one scene: a question has one answer in all pools of the split.
    """

    def __init__(
        self,
        rng: random.Random,
        taken: set[Scene],
        *,
        min_things: int,
        max_things: int,
        num_near_misses: int,
    ) -> None:
        self.rng = rng
        self.num_near_misses = num_near_misses
        self._things = (min_things, max_things)
        self._taken = taken
        self._clues: Counter[Clue] = Counter()
        self._asked: set[Clue] = set()
        self._sides: set[tuple[str, tuple[Thing, ...]]] = set()

    def scene(self, *, min_things: int = 2) -> Scene:
        """A new scene."""
        while True:
            low, high = self._things
            num_things = self.rng.randint(max(low, min_things), high)
            scene = scenes.random_scene(self.rng, num_things=num_things)
            if self.is_free(scene):
                return self.take(scene)

    def near_misses(
        self, scene: Scene, count: int, *, accept: Callable[[Scene], bool] | None = None
    ) -> list[Scene]:
        """New scenes easily taken for `scene`."""
        found = scenes.near_misses(
            scene,
            self.rng,
            count=count,
            accept=lambda other: self.is_free(other) and (not accept or accept(other)),
        )
        return [self.take(other) for other in found]

    def edits(
        self, scene: Scene, count: int, *, make: Callable[[Scene, random.Random], wording.Edit]
    ) -> list[wording.Edit]:
        """Modifications of `scene` with new scenes as results."""
        found: list[wording.Edit] = []
        while len(found) < count:
            edit = make(scene, self.rng)
            if len(edit.scene.things) <= self._things[1] and self.is_free(edit.scene):
                self.take(edit.scene)
                found.append(edit)
        return found

    def is_free(self, scene: Scene) -> bool:
        """Whether nobody has the scene, and it answers no question that was asked for another."""
        return scene not in self._taken and self._asked.isdisjoint(scenes.clues(scene))

    def take(self, scene: Scene) -> Scene:
        """Claim a free scene."""
        self._taken.add(scene)
        self._clues.update(scenes.clues(scene))
        return scene

    def ask(self, scene: Scene) -> Clue | None:
        """A clue that this scene alone answers; no later scene of the deck will answer it."""
        own = sorted(clue for clue in scenes.clues(scene) if self._clues[clue] == 1)
        if not own:
            return None
        clue = self.rng.choice(own)
        self._asked.add(clue)
        return clue

    def is_new_side(self, scene: Scene, side: str) -> bool:
        """Whether the side holds something that was not told before."""
        things = scenes.things_on(scene, side)
        return bool(things) and (side, things) not in self._sides

    def tell_side(self, scene: Scene, side: str) -> None:
        """Claim what the side holds."""
        self._sides.add((side, scenes.things_on(scene, side)))


Family = Callable[[Deck], list[Target]]
"""Deals one family; its first target always has a question."""


def _family_of_scenes(deck: Deck) -> list[Scene]:
    scene = deck.scene()
    return [scene, *deck.near_misses(scene, deck.num_near_misses)]


def _caption(scene: Scene) -> Callable[[int], str]:
    return lambda seed: wording.describe(scene, seed=seed)


def _caption_to_picture(deck: Deck) -> list[Target]:
    return [Target(Content(picture=s), Content(text=_caption(s))) for s in _family_of_scenes(deck)]


def _picture_to_caption(deck: Deck) -> list[Target]:
    return [Target(Content(text=_caption(s)), Content(picture=s)) for s in _family_of_scenes(deck)]


def _picture_to_picture(deck: Deck) -> list[Target]:
    return [Target(Content(picture=s), Content(picture=s)) for s in _family_of_scenes(deck)]


def _caption_to_news(deck: Deck) -> list[Target]:
    """The candidate's headline names only part of what its picture shows."""

    def news(scene: Scene) -> Content:
        return Content(picture=scene, text=lambda seed: wording.headline(scene, seed=seed))

    return [Target(news(s), Content(text=_caption(s))) for s in _family_of_scenes(deck)]


def _question_to_passage(deck: Deck) -> list[Target]:
    def target(scene: Scene, clue: Clue | None) -> Target:
        question = Content(text=lambda seed: wording.ask_clue(clue, seed=seed)) if clue else None
        return Target(Content(text=_caption(scene)), question)

    while (clue := deck.ask(first := deck.scene())) is None:
        pass  # what it says of two things, another scene says too
    others = deck.near_misses(first, deck.num_near_misses)
    return [target(first, clue), *(target(scene, deck.ask(scene)) for scene in others)]


def _side_questions(deck: Deck, *, beside: bool, with_picture: bool) -> list[Target]:
    """A picture and a question about one side of it; near misses differ there; another side is told too."""

    def target(scene: Scene, side: str) -> Target:
        deck.tell_side(scene, side)
        ask = partial(wording.ask_beside, scene, side) if beside else partial(wording.ask_side, side)
        return Target(
            Content(
                scene if with_picture else None, lambda seed: wording.describe_side(scene, side, seed=seed)
            ),
            Content(scene, lambda seed: ask(seed=seed)),
        )

    def is_full(scene: Scene, side: str) -> bool:
        return len(scenes.things_on(scene, side)) == 2

    while True:
        scene = deck.scene(min_things=3)
        sides = deck.rng.sample(scenes.SIDES, 4)
        fitting = [s for s in sides if deck.is_new_side(scene, s)]
        side = next((s for s in fitting if is_full(scene, s)), None)
        if side is not None and len(fitting) > 1:
            break
    other_side = next(s for s in fitting if s != side)
    first, second = target(scene, side), target(scene, other_side)
    targets = [first]
    for _ in range(deck.num_near_misses - 1):
        # One by one, so that two near misses do not tell the same side.
        (near,) = deck.near_misses(scene, 1, accept=lambda s: is_full(s, side) and deck.is_new_side(s, side))
        targets.append(target(near, side))
    return [*targets, second]


def _picture_with_edit(deck: Deck, *, make: Callable[[Scene, random.Random], wording.Edit]) -> list[Target]:
    """In the pool with the two results: the reference picture itself, and near misses of the first result."""

    def target(edit: wording.Edit) -> Target:
        return Target(Content(picture=edit.scene), Content(scene, lambda _: edit.text))

    scene = deck.scene()
    first, second = deck.edits(scene, 2, make=make)
    near = deck.near_misses(first.scene, deck.num_near_misses - 2)
    reference = Target(Content(picture=scene, as_asked=True))
    return [target(first), target(second), reference, *(Target(Content(picture=s)) for s in near)]


FAMILIES: dict[str, Family] = {
    "visualnews_task0": _caption_to_picture,
    "webqa_task1": _question_to_passage,
    "edis_task2": _caption_to_news,
    "nights_task4": _picture_to_picture,
    "oven_task6": partial(_side_questions, beside=False, with_picture=False),
    "oven_task8": partial(_side_questions, beside=False, with_picture=True),
    "infoseek_task6": partial(_side_questions, beside=True, with_picture=False),
    "infoseek_task8": partial(_side_questions, beside=True, with_picture=True),
    "fashioniq_task7": partial(_picture_with_edit, make=wording.edit_twice),
    "cirr_task7": partial(_picture_with_edit, make=wording.edit),
    "mscoco_task0": _caption_to_picture,
    "mscoco_task3": _picture_to_caption,
}
"""The tasks of the world, by data set id and task id."""

PROMPTS: dict[str, tuple[str, str, str, str]] = {
    "visualnews_task0": (
        "Find the news picture that fits this report.",
        "Which news picture shows what is told here?",
        "Retrieve the press photo of this event.",
        "Look for the news image behind these words.",
    ),
    "webqa_task1": (
        "Find the passage that answers this question.",
        "Retrieve a text with the answer to the question.",
        "Which passage holds the answer?",
        "Look for the text that tells what is asked.",
    ),
    "edis_task2": (
        "Find the news picture and headline that fit this report.",
        "Retrieve the headline with picture of this event.",
        "Which picture with headline shows what is told here?",
        "Look for the news story with its image behind these words.",
    ),
    "nights_task4": (
        "Find a picture that looks like this one.",
        "Retrieve another picture of the same scene.",
        "Which picture shows the same things in the same places?",
        "Look for the image most similar to this image.",
    ),
    "oven_task6": (
        "Find the text that answers the question about this picture.",
        "Retrieve the passage that tells what is asked of the picture.",
        "Which text answers the question on the image?",
        "Look for the words that tell the part of the picture in question.",
    ),
    "oven_task8": (
        "Find the picture with text that answers the question about this picture.",
        "Retrieve the image and passage that tell what is asked of the picture.",
        "Which picture and text answer the question on the image?",
        "Look for the illustrated answer to the question about the picture.",
    ),
    "infoseek_task6": (
        "Find the text that holds the knowledge asked for about this picture.",
        "Retrieve the passage with what the question wants to know of the picture.",
        "Which text knows the answer for this image?",
        "Look for the words that answer what is asked about the image.",
    ),
    "infoseek_task8": (
        "Find the picture with text that holds the knowledge asked for about this picture.",
        "Retrieve the image and passage with what the question wants to know.",
        "Which picture and text know the answer for this image?",
        "Look for the illustrated passage that answers what is asked about the image.",
    ),
    "fashioniq_task7": (
        "Find the design that follows from this picture and the style note.",
        "Retrieve the design after both changes.",
        "Which design fits the reference picture and the note?",
        "Look for the picture of the changed design.",
    ),
    "cirr_task7": (
        "Find the picture that this one becomes by the change.",
        "Retrieve the image after the modification of this image.",
        "Which picture shows the scene with the change made?",
        "Look for the scene as it is once changed.",
    ),
    "mscoco_task0": (
        "Find the picture of this caption.",
        "Retrieve the everyday image that fits the caption.",
        "Which picture is described here?",
        "Look for the scene told in this caption.",
    ),
    "mscoco_task3": (
        "Find the caption of this picture.",
        "Retrieve the words that describe the everyday image.",
        "Which caption tells this scene?",
        "Look for the description of this picture.",
    ),
}
