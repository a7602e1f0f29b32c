"""The demonstration world on disk: M-BEIR's files about small scenes, and the data of the two stages before.

Twelve of M-BEIR's tasks, so that all eight kinds occur. Scenes come in families: one that is asked for and its near
misses, which stand in the same pool. Every scene of val and test is new to all training data, near misses included.

A pool also holds *equivalents* (a positive's meaning drawn or worded anew) and *twins* (its very content under
another did). In training they are not listed as positives, as in found data, so that mining meets false negatives;
in val and test they are, so that the metric is fair.
"""

import csv
import os
import random
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from umarvel_ray.artifacts import atomic_folder, read_json, write_json
from umarvel_ray.config import Config
from umarvel_ray.data.mbeir import (
    TASK_BY_NAME,
    Mbeir,
    QueryRecord,
    Task,
    local_pool_name,
    write_instructions,
    write_pool,
    write_queries,
)
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.data.trec import write_qrels
from umarvel_ray.demo import scenes
from umarvel_ray.demo.scenes import Clue, Scene, Thing
from umarvel_ray.errors import OutputError

WORLD_FILE = "world.json"
MBEIR_FOLDER = "M-BEIR"
SENTENCES_FILE = "nli/nli_for_simcse.csv"
CAPTIONS_FILE = "cc3m/chat.json"

Share = Annotated[float, Field(ge=0, le=1)]
Progress = Callable[[int, int], None]
"""Called with (pictures drawn, pictures in all)."""


class WorldConfig(Config):
    """How large the world is. The same settings give the same bytes."""

    seed: int
    """Of every scene, word and drawing."""
    pixels: Annotated[int, Field(ge=28, le=1024)] = 56
    """Side of a picture; 56 makes four image tokens of Qwen2-VL's."""
    min_things: Annotated[int, Field(ge=2, le=4)] = 2
    max_things: Annotated[int, Field(ge=3, le=4)] = 4
    """Things per scene; the questions about a side draw scenes of three at least."""
    train_queries: PositiveInt = 500
    val_queries: PositiveInt = 32
    test_queries: PositiveInt = 120
    """Queries per task."""
    near_misses: Annotated[int, Field(ge=2, le=12)] = 3
    """Other candidates per family of scenes. In training they are asked for as well."""
    equivalents: Annotated[float, Field(ge=0, le=8)] = 1.0
    """Unlisted candidates of the same meaning per positive, in training pools."""
    listed_equivalents: Annotated[float, Field(ge=0, le=8)] = 0.25
    """The same in val and test pools, where they are positives."""
    twins: Share = 0.03
    """Positives with an exact copy under another did: unlisted in training, positives in val and test."""
    shared: Share = 0.3
    """OVEN's and InfoSeek's positives that the other data set's pool holds too; listed after the own ones."""
    upsampled: NonNegativeFloat = 0.25
    """Repeated lines in the union training file, per query of EDIS, NIGHTS, FashionIQ and CIRR."""
    sentence_pairs: PositiveInt = 4000
    """Rows of stage 1a, one scene each."""
    captioned_scenes: PositiveInt = 1500
    """Scenes of stage 1b."""
    renderings: PositiveInt = 2
    """Pictures of each scene of stage 1b, each with a caption of its own."""

    @model_validator(mode="after")
    def _range_of_things(self) -> Self:
        if self.min_things > self.max_things:
            raise ValueError(
                f"min_things is {self.min_things} but max_things is {self.max_things}. Lower min_things."
            )
        return self


def make_world(
    config: WorldConfig, output: Path, *, workers: int = 1, progress: Progress | None = None
) -> None:
    """Write the world under `output`, whole or not at all; a world that stands there is replaced.

    Args:
        config: What to write.
        output: Becomes `M-BEIR/`, `nli/`, `cc3m/` and `world.json`, which holds the settings, the number of records
            per file, and how many equivalents and twins there are.
        workers: Processes that draw; more than one are spawned, so the caller's main module must be importable.
        progress: See `Progress`.

    Raises:
        OutputError: `output` holds something other than a world.
    """
    output = Path(output)
    if output.exists() and any(output.iterdir()) and not (output / WORLD_FILE).is_file():
        raise OutputError(
            f"{output}: holds files but no {WORLD_FILE}, so it is no world. Give another output folder."
        )
    with atomic_folder(output) as folder:
        plan = _plan(config)
        counts = _write_mbeir(plan, config, folder / MBEIR_FOLDER)
        counts[SENTENCES_FILE] = _write_sentences(plan, folder / SENTENCES_FILE)
        counts[CAPTIONS_FILE] = _write_captions(plan, folder / CAPTIONS_FILE)
        _draw_all(plan.album.drawings, config.pixels, folder, workers=workers, progress=progress)
        world = {
            "config": config.model_dump(),
            "records": counts,
            "pictures": len(plan.album.drawings),
            "copies": {split: _copies(plan, split) for split in ("train", "val", "test")},
        }
        write_json(folder / WORLD_FILE, world)


def read_world_config(output: Path) -> WorldConfig:
    """The settings of the world under `output`, to know whether it is the one that is wanted."""
    return WorldConfig.model_validate(read_json(Path(output) / WORLD_FILE)["config"])


# ---- what is in the world ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Content:
    """What a record holds: a scene to draw, a text by seed, or both."""

    picture: Scene | None = None
    text: Callable[[int], str] | None = None
    as_asked: bool = False
    """Take the very file that queries show: CIRR's pools hold the reference pictures."""


@dataclass(frozen=True, slots=True)
class _Target:
    """One meaning in a pool, and how to ask for it; without a question it is there to mislead."""

    answer: _Content
    question: _Content | None = None


@dataclass(eq=False, slots=True)
class _Entry:
    """A candidate before it has its number."""

    txt: str | None
    img_path: str | None
    did: str = ""


@dataclass(eq=False, slots=True)
class _Asked:
    """A query before it has its number."""

    task: Task
    txt: str | None
    img_path: str | None
    positives: list[_Entry]
    num_unlisted: int = 0
    num_equivalents: int = 0
    num_twins: int = 0
    qid: str = ""


@dataclass(frozen=True, slots=True)
class _Drawing:
    path: str
    scene: Scene
    seed: int


class _Album:
    """All pictures of the world; they are drawn at the end, in any order."""

    def __init__(self, rng: random.Random) -> None:
        self.drawings: list[_Drawing] = []
        self._rng = rng
        self._shown: dict[tuple[str, Scene], str] = {}
        self._numbers: Counter[str] = Counter()

    def new(self, folder: str, scene: Scene) -> str:
        """The path of another rendering, from the world's folder."""
        return self._add(folder, scene, self._rng.getrandbits(48))

    def shown(self, folder: str, scene: Scene) -> str:
        """The path of the one rendering that queries about this scene show."""
        if (folder, scene) not in self._shown:
            self._shown[folder, scene] = self.new(folder, scene)
        return self._shown[folder, scene]

    def copy(self, path: str) -> str:
        """The path of a file with the same bytes."""
        folder = os.path.dirname(path)
        # Numbers run from 1 within a folder, but folders interleave; copies are rare, so looking through is cheap.
        original = next(drawing for drawing in reversed(self.drawings) if drawing.path == path)
        return self._add(folder, original.scene, original.seed)

    def _add(self, folder: str, scene: Scene, seed: int) -> str:
        self._numbers[folder] += 1
        path = f"{folder}/{self._numbers[folder]:06d}.jpg"
        self.drawings.append(_Drawing(path, scene, seed))
        return path


class _Deck:
    """Scenes, each dealt once in the whole world, so that a meaning belongs to one family and one split.

    `taken` is shared by the decks of all splits. Within a deck, a clue that was asked for and a side that was told
    belong to one scene: a question has one answer in all pools of the split.
    """

    def __init__(self, config: WorldConfig, rng: random.Random, taken: set[Scene]) -> None:
        self.config = config
        self.rng = rng
        self._taken = taken
        self._clues: Counter[Clue] = Counter()
        self._asked: set[Clue] = set()
        self._sides: set[tuple[str, tuple[Thing, ...]]] = set()

    def scene(self, *, min_things: int = 2) -> Scene:
        """A new scene."""
        while True:
            low = max(min_things, self.config.min_things)
            scene = scenes.random_scene(self.rng, num_things=self.rng.randint(low, self.config.max_things))
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
        # Two near misses may answer one clue: it is asked for only after both are taken, and then counted twice.
        return [self.take(other) for other in found]

    def edits(
        self, scene: Scene, count: int, *, make: Callable[[Scene, random.Random], scenes.Edit]
    ) -> list[scenes.Edit]:
        """Modifications of `scene` with new scenes as results."""
        found: list[scenes.Edit] = []
        while len(found) < count:
            edit = make(scene, self.rng)
            if len(edit.scene.things) <= self.config.max_things and self.is_free(edit.scene):
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

    def __contains__(self, scene: Scene) -> bool:
        return scene in self._taken


# ---- the families of each task ----------------------------------------------------------------------------------

_Family = Callable[[_Deck], list[_Target]]
"""Deals one family; its first target always has a question."""


def _family_of_scenes(deck: _Deck) -> list[Scene]:
    scene = deck.scene()
    return [scene, *deck.near_misses(scene, deck.config.near_misses)]


def _caption(scene: Scene) -> Callable[[int], str]:
    return lambda seed: scenes.describe(scene, seed=seed)


def _caption_to_picture(deck: _Deck) -> list[_Target]:
    return [_Target(_Content(picture=s), _Content(text=_caption(s))) for s in _family_of_scenes(deck)]


def _picture_to_caption(deck: _Deck) -> list[_Target]:
    return [_Target(_Content(text=_caption(s)), _Content(picture=s)) for s in _family_of_scenes(deck)]


def _picture_to_picture(deck: _Deck) -> list[_Target]:
    return [_Target(_Content(picture=s), _Content(picture=s)) for s in _family_of_scenes(deck)]


def _caption_to_news(deck: _Deck) -> list[_Target]:
    """The candidate's headline names only part of what its picture shows."""

    def news(scene: Scene) -> _Content:
        return _Content(picture=scene, text=lambda seed: scenes.headline(scene, seed=seed))

    return [_Target(news(s), _Content(text=_caption(s))) for s in _family_of_scenes(deck)]


def _question_to_passage(deck: _Deck) -> list[_Target]:
    def target(scene: Scene, clue: Clue | None) -> _Target:
        question = _Content(text=lambda seed: scenes.ask_clue(clue, seed=seed)) if clue else None
        return _Target(_Content(text=_caption(scene)), question)

    while (clue := deck.ask(first := deck.scene())) is None:
        pass  # what it says of two things, another scene says too
    others = deck.near_misses(first, deck.config.near_misses)
    return [target(first, clue), *(target(scene, deck.ask(scene)) for scene in others)]


def _side_questions(deck: _Deck, *, beside: bool, with_picture: bool) -> list[_Target]:
    """A picture and a question about one side of it; near misses differ there, and another side is told too."""

    def target(scene: Scene, side: str) -> _Target:
        deck.tell_side(scene, side)
        ask = partial(scenes.ask_beside, scene, side) if beside else partial(scenes.ask_side, side)
        return _Target(
            _Content(
                scene if with_picture else None, lambda seed: scenes.describe_side(scene, side, seed=seed)
            ),
            _Content(scene, lambda seed: ask(seed=seed)),
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
    for _ in range(deck.config.near_misses - 1):
        # One by one, so that two near misses do not tell the same side.
        (near,) = deck.near_misses(scene, 1, accept=lambda s: is_full(s, side) and deck.is_new_side(s, side))
        targets.append(target(near, side))
    return [*targets, second]


def _picture_with_edit(deck: _Deck, *, make: Callable[[Scene, random.Random], scenes.Edit]) -> list[_Target]:
    """In the pool with the two results: the reference picture itself, and near misses of the first result."""

    def target(edit: scenes.Edit) -> _Target:
        return _Target(_Content(picture=edit.scene), _Content(scene, lambda _: edit.text))

    scene = deck.scene()
    first, second = deck.edits(scene, 2, make=make)
    near = deck.near_misses(first.scene, deck.config.near_misses - 2)
    reference = _Target(_Content(picture=scene, as_asked=True))
    return [target(first), target(second), reference, *(_Target(_Content(picture=s)) for s in near)]


_FAMILIES: dict[str, _Family] = {
    "visualnews_task0": _caption_to_picture,
    "webqa_task1": _question_to_passage,
    "edis_task2": _caption_to_news,
    "nights_task4": _picture_to_picture,
    "oven_task6": partial(_side_questions, beside=False, with_picture=False),
    "oven_task8": partial(_side_questions, beside=False, with_picture=True),
    "infoseek_task6": partial(_side_questions, beside=True, with_picture=False),
    "infoseek_task8": partial(_side_questions, beside=True, with_picture=True),
    "fashioniq_task7": partial(_picture_with_edit, make=scenes.edit_twice),
    "cirr_task7": partial(_picture_with_edit, make=scenes.edit),
    "mscoco_task0": _caption_to_picture,
    "mscoco_task3": _picture_to_caption,
}
"""The tasks of the world, by data set id and task id."""

_SHARING = {"oven": "infoseek", "infoseek": "oven"}
_UPSAMPLED = ("edis", "nights", "fashioniq", "cirr")

_PROMPTS: dict[str, tuple[str, str, str, str]] = {
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


# ---- from families to records -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Plan:
    """Everything that will be written, with names and numbers."""

    pools: dict[tuple[str, str], list[_Entry]]
    """By (task, part): train, eval (val and test together), or val and test where a data set keeps them apart."""
    queries: dict[tuple[str, str], list[_Asked]]
    """By (task, split)."""
    sentences: list[tuple[str, str, str]]
    captions: list[tuple[str, str]]
    """(picture, caption)"""
    album: _Album
    rng: random.Random = field(compare=False)


def _plan(config: WorldConfig) -> _Plan:
    rng = random.Random(config.seed)
    taken: set[Scene] = set()
    album = _Album(random.Random(rng.getrandbits(64)))
    plan = _Plan({}, {}, [], [], album, rng)
    evaluation = _Deck(config, random.Random(rng.getrandbits(64)), taken)
    training = _Deck(config, random.Random(rng.getrandbits(64)), taken)
    for task in _tasks():
        for split in ("val", "test"):
            _add_task(plan, task, split, evaluation)
    for task in _tasks():
        _add_task(plan, task, "train", training)
    for split in ("val", "test", "train"):
        _share_pages(plan, split, config.shared)
    _give_numbers(plan)
    _add_sentences(plan, training)
    _add_captions(plan, training)
    return plan


def _tasks() -> list[Task]:
    return [TASK_BY_NAME[name] for name in _FAMILIES]


def _part(task: Task, split: str) -> str:
    """Which pool of a task serves a split."""
    if split == "train":
        return split
    return "eval" if local_pool_name(task, "val") == local_pool_name(task, "test") else split


def _add_task(plan: _Plan, task: Task, split: str, deck: _Deck) -> None:
    config, rng = deck.config, deck.rng
    is_train = split == "train"
    wanted = {"train": config.train_queries, "val": config.val_queries, "test": config.test_queries}[split]
    equivalents = _spread(config.equivalents if is_train else config.listed_equivalents)
    twins = _spread(config.twins)
    folder = f"{MBEIR_FOLDER}/mbeir_images/{_image_folder(task)}_images/{split}"
    pool = plan.pools.setdefault((task.name, _part(task, split)), [])
    asked = plan.queries.setdefault((task.name, split), [])
    while len(asked) < wanted:
        for place, target in enumerate(_FAMILIES[task.name](deck)):
            entries = [_entry(plan.album, folder, target.answer, rng, ())]
            pool.append(entries[0])
            if target.question is None or len(asked) == wanted or (place > 0 and not is_train):
                continue
            query = _asked(plan.album, task, folder, target.question, entries[0], rng)
            asked.append(query)
            query.num_equivalents, query.num_twins = next(equivalents), next(twins)
            for _ in range(query.num_equivalents):
                entries.append(
                    _entry(plan.album, folder, target.answer, rng, [entry.txt for entry in entries])
                )
            for _ in range(query.num_twins):
                entries.append(_twin(plan.album, entries[0]))
            pool += entries[1:]
            query.num_unlisted = len(entries) - 1 if is_train else 0
            query.positives = entries[:1] if is_train else entries


def _image_folder(task: Task) -> str:
    return "oven" if task.dataset == "infoseek" else task.dataset  # they share OVEN's pictures


def _spread(share: float) -> Iterator[int]:
    """Whole numbers whose running mean stays as near to `share` as whole numbers can."""
    position = 0
    while True:
        yield int((position + 1) * share) - int(position * share)
        position += 1


def _entry(
    album: _Album, folder: str, content: _Content, rng: random.Random, used: Container[str | None]
) -> _Entry:
    """A candidate of this content; its wording is none of `used`, which is always possible: texts have many."""
    show = album.shown if content.as_asked else album.new
    img_path = show(folder, content.picture) if content.picture else None
    txt = content.text(rng.getrandbits(48)) if content.text else None
    while txt is not None and txt in used:
        txt = content.text(rng.getrandbits(48)) if content.text else None
    return _Entry(txt, img_path)


def _twin(album: _Album, entry: _Entry) -> _Entry:
    return _Entry(entry.txt, album.copy(entry.img_path) if entry.img_path else None)


def _asked(
    album: _Album, task: Task, folder: str, content: _Content, positive: _Entry, rng: random.Random
) -> _Asked:
    txt = content.text(rng.getrandbits(48)) if content.text else None
    while txt is not None and txt == positive.txt and content.text:
        txt = content.text(rng.getrandbits(48))
    return _Asked(task, txt, album.shown(folder, content.picture) if content.picture else None, [positive])


def _share_pages(plan: _Plan, split: str, share: float) -> None:
    """OVEN and InfoSeek speak of one encyclopedia: a positive of one may stand in the other's pool as well."""
    for task in _tasks():
        if task.dataset not in _SHARING:
            continue
        other = TASK_BY_NAME[f"{_SHARING[task.dataset]}_task{task.task_id}"]
        pool = plan.pools[other.name, _part(other, split)]
        for query, is_shared in zip(plan.queries[task.name, split], _spread(share), strict=False):
            if is_shared:
                page = _Entry(query.positives[0].txt, query.positives[0].img_path)
                query.positives.append(page)
                pool.append(page)


def _give_numbers(plan: _Plan) -> None:
    """Candidates are numbered within a data set over all its pools, queries within a data set and split.

    Both are shuffled first, so that a number tells nothing.
    """
    numbers: Counter[int | tuple[int, str]] = Counter()
    for (name, _), pool in plan.pools.items():
        plan.rng.shuffle(pool)
        dataset_id = TASK_BY_NAME[name].dataset_id
        for entry in pool:
            numbers[dataset_id] += 1
            entry.did = f"{dataset_id}:{numbers[dataset_id]}"
    for (name, split), queries in plan.queries.items():
        plan.rng.shuffle(queries)
        dataset_id = TASK_BY_NAME[name].dataset_id
        for query in queries:
            numbers[dataset_id, split] += 1
            query.qid = f"{dataset_id}:{numbers[dataset_id, split]}"


def _add_sentences(plan: _Plan, deck: _Deck) -> None:
    rng = deck.rng
    for _ in range(deck.config.sentence_pairs):
        scene = deck.scene()
        first = second = scenes.describe(scene, seed=rng.getrandbits(48))
        while second == first:
            second = scenes.describe(scene, seed=rng.getrandbits(48))
        (other,) = deck.near_misses(scene, 1)
        plan.sentences.append((first, second, scenes.describe(other, seed=rng.getrandbits(48))))


def _add_captions(plan: _Plan, deck: _Deck) -> None:
    for _ in range(deck.config.captioned_scenes):
        scene = deck.scene()
        for _ in range(deck.config.renderings):
            caption = scenes.describe(scene, seed=deck.rng.getrandbits(48))
            plan.captions.append((plan.album.new("cc3m/images", scene), caption))
    plan.rng.shuffle(plan.captions)


def _copies(plan: _Plan, split: str) -> dict[str, int | bool]:
    queries = [query for (_, part), found in plan.queries.items() if part == split for query in found]
    return {
        "queries": len(queries),
        "equivalents": sum(query.num_equivalents for query in queries),
        "twins": sum(query.num_twins for query in queries),
        "listed_as_positives": split != "train",
    }


# ---- writing ----------------------------------------------------------------------------------------------------


def _write_mbeir(plan: _Plan, config: WorldConfig, root: Path) -> dict[str, int]:
    """Write all files but the pictures.

    Returns:
        Records per file, by path from the world's folder; a query repeated in a union file counts each time.
    """
    root.mkdir(parents=True)
    files, counts = Mbeir(root), {}

    def count(path: Path, number: int) -> None:
        counts[path.relative_to(root.parent).as_posix()] = number

    def save_queries(path: Path, queries: list[_Asked]) -> None:
        write_queries(path, [_query_record(query, root) for query in queries], root)
        count(path, len(queries))

    def save_qrels(path: Path, queries: list[_Asked]) -> None:
        qrels = {query.qid: {entry.did: 1 for entry in query.positives} for query in queries}
        write_qrels(path, qrels, task_ids={query.qid: query.task.task_id for query in queries})
        count(path, sum(len(grades) for grades in qrels.values()))

    def save_pool(path: Path, pool: list[_Entry]) -> None:
        world = root.parent
        write_pool(
            path, [Candidate(e.did, e.txt, e.img_path and str(world / e.img_path)) for e in pool], root
        )
        count(path, len(pool))

    union: list[_Asked] = []
    for dataset in dict.fromkeys(task.dataset for task in _tasks()):
        queries = [
            q for task in _tasks() if task.dataset == dataset for q in plan.queries[task.name, "train"]
        ]
        plan.rng.shuffle(queries)
        save_queries(files.training_queries_path(dataset), queries)
        save_qrels(files.training_qrels_path(dataset), queries)
        repeats = int(len(queries) * config.upsampled) if dataset in _UPSAMPLED else 0
        union += [*queries, *plan.rng.choices(queries, k=repeats)]
    save_queries(files.union_training_queries_path(), union)

    for task in _tasks():
        for split in ("val", "test"):
            save_queries(files.queries_path(task, split), plan.queries[task.name, split])
            save_qrels(files.qrels_path(task, split), plan.queries[task.name, split])
            save_pool(files.local_pool_path(task, split), plan.pools[task.name, _part(task, split)])
    val_queries = [query for task in _tasks() for query in plan.queries[task.name, "val"]]
    save_queries(root / "query/union_val/mbeir_union_val.jsonl", val_queries)

    def all_of(split: str) -> Iterator[_Entry]:
        return (entry for task in _tasks() for entry in plan.pools[task.name, _part(task, split)])

    named = {entry.did for query in val_queries for entry in query.positives}
    save_pool(files.global_pool_path("train"), _in_order(all_of("train")))
    save_pool(
        files.global_pool_path("val"), _in_order(entry for entry in all_of("val") if entry.did in named)
    )
    save_pool(files.global_pool_path("test"), _in_order(all_of("test")))
    write_instructions(
        files.instructions_path(),
        {(t.dataset_id, t.query_modality, t.candidate_modality): _PROMPTS[t.name] for t in _tasks()},
    )
    return counts


def _in_order(entries: Iterator[_Entry]) -> list[_Entry]:
    return sorted(entries, key=lambda entry: tuple(int(part) for part in entry.did.split(":")))


def _query_record(query: _Asked, root: Path) -> QueryRecord:
    img_path = query.img_path and str(root.parent / query.img_path)
    return QueryRecord(
        query=Query(query.qid, query.txt, img_path),
        positives=tuple(entry.did for entry in query.positives),
        task_id=query.task.task_id,
    )


def _write_sentences(plan: _Plan, path: Path) -> int:
    path.parent.mkdir(parents=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("sent0", "sent1", "hard_neg"))
        writer.writerows(plan.sentences)
    return len(plan.sentences)


def _write_captions(plan: _Plan, path: Path) -> int:
    """A list of id, image (from the file's own folder) and caption, as LLaVA's pre-training set has it."""
    rows: list[dict[str, str]] = []
    for picture, caption in plan.captions:
        image = os.path.relpath(picture, os.path.dirname(CAPTIONS_FILE))
        rows.append({"id": Path(image).stem, "image": image, "caption": caption})
    write_json(path, rows)
    return len(rows)


def _draw_all(
    drawings: list[_Drawing], pixels: int, folder: Path, *, workers: int, progress: Progress | None
) -> None:
    for parent in sorted({os.path.dirname(drawing.path) for drawing in drawings}):
        (folder / parent).mkdir(parents=True, exist_ok=True)
    blocks = [drawings[start : start + 256] for start in range(0, len(drawings), 256)]
    draw = partial(_draw_block, pixels=pixels, folder=folder)
    if workers == 1:
        _follow(map(draw, blocks), len(drawings), progress)
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    # Spawned, not forked: the caller may hold threads, which a fork would freeze in the child.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        _follow(pool.map(draw, blocks), len(drawings), progress)


def _follow(finished: Iterator[int], total: int, progress: Progress | None) -> None:
    done = 0
    for number in finished:
        done += number
        if progress:
            progress(done, total)


def _draw_block(drawings: list[_Drawing], *, pixels: int, folder: Path) -> int:
    for drawing in drawings:
        picture = scenes.draw(drawing.scene, seed=drawing.seed, pixels=pixels)
        # At this size, halved colour resolution would smear a small shape's colour over its neighbours.
        picture.save(folder / drawing.path, quality=90, subsampling=0)
    return len(drawings)
