"""The demonstration world in memory: every record with its number, every picture that is to be drawn.

`world.py` writes it."""

import os
import random
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from umarvel_ray.config import Config
from umarvel_ray.data.mbeir import TASK_BY_NAME, Task, local_pool_name
from umarvel_ray.demo import wording
from umarvel_ray.demo.families import FAMILIES, Content, Deck
from umarvel_ray.demo.scenes import Scene

MBEIR_FOLDER = "M-BEIR"
_SHARING = {"oven": "infoseek", "infoseek": "oven"}
UPSAMPLED = ("edis", "nights", "fashioniq", "cirr")
"""Data sets whose lines the union training file repeats, as M-BEIR does with its small ones."""

Share = Annotated[float, Field(ge=0, le=1)]


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


@dataclass(eq=False, slots=True)
class Entry:
    """A candidate before it has its number."""

    txt: str | None
    img_path: str | None
    did: str = ""


@dataclass(eq=False, slots=True)
class Asked:
    """A query before it has its number."""

    task: Task
    txt: str | None
    img_path: str | None
    positives: list[Entry]
    num_equivalents: int = 0
    num_twins: int = 0
    qid: str = ""


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture to be drawn; its path starts at the world's folder."""

    path: str
    scene: Scene
    seed: int


class Album:
    """All pictures of the world; they are drawn at the end, in any order."""

    def __init__(self, rng: random.Random) -> None:
        self.drawings: list[Drawing] = []
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
        recent_first = reversed(self.drawings)
        original = next(drawing for drawing in recent_first if drawing.path == path)
        return self._add(folder, original.scene, original.seed)

    def _add(self, folder: str, scene: Scene, seed: int) -> str:
        self._numbers[folder] += 1
        path = f"{folder}/{self._numbers[folder]:06d}.jpg"
        self.drawings.append(Drawing(path, scene, seed))
        return path


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that will be written, with names and numbers."""

    pools: dict[tuple[str, str], list[Entry]]
    """By (task, part): train, and eval (val and test together) or, where they are kept apart, each."""
    queries: dict[tuple[str, str], list[Asked]]
    """By (task, split)."""
    sentences: list[tuple[str, str, str]]
    captions: list[tuple[str, str]]
    """(picture, caption)"""
    album: Album
    rng: random.Random = field(compare=False)


def make_plan(config: WorldConfig) -> Plan:
    """All records of the world, numbered: a pure function of its settings, and all of its randomness."""
    rng = random.Random(config.seed)
    taken: set[Scene] = set()
    album = Album(random.Random(rng.getrandbits(64)))
    plan = Plan({}, {}, [], [], album, rng)
    evaluation, training = (
        Deck(
            random.Random(rng.getrandbits(64)),
            taken,
            min_things=config.min_things,
            max_things=config.max_things,
            num_near_misses=config.near_misses,
        )
        for _ in range(2)
    )
    for task in world_tasks():
        for split in ("val", "test"):
            _add_task(plan, task, split, evaluation, config)
    for task in world_tasks():
        _add_task(plan, task, "train", training, config)
    for split in ("val", "test", "train"):
        _share_pages(plan, split, config.shared)
    _give_numbers(plan)
    _add_sentences(plan, training, count=config.sentence_pairs)
    _add_captions(plan, training, count=config.captioned_scenes, renderings=config.renderings)
    return plan


def world_tasks() -> list[Task]:
    """The tasks that the world has, in the order in which its data sets are numbered."""
    return [TASK_BY_NAME[name] for name in FAMILIES]


def pool_part(task: Task, split: str) -> str:
    """Which pool of a task serves a split."""
    if split == "train":
        return split
    return "eval" if local_pool_name(task, "val") == local_pool_name(task, "test") else split


def _add_task(plan: Plan, task: Task, split: str, deck: Deck, config: WorldConfig) -> None:
    rng = deck.rng
    is_train = split == "train"
    wanted = {"train": config.train_queries, "val": config.val_queries, "test": config.test_queries}[split]
    equivalents = _spread(config.equivalents if is_train else config.listed_equivalents)
    twins = _spread(config.twins)
    folder = f"{MBEIR_FOLDER}/mbeir_images/{_image_folder(task)}_images/{split}"
    pool = plan.pools.setdefault((task.name, pool_part(task, split)), [])
    asked = plan.queries.setdefault((task.name, split), [])
    while len(asked) < wanted:
        for place, target in enumerate(FAMILIES[task.name](deck)):
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
    album: Album, folder: str, content: Content, rng: random.Random, used: Container[str | None]
) -> Entry:
    """A candidate of this content, worded like none of `used`: there are always more wordings."""
    show = album.shown if content.as_asked else album.new
    img_path = show(folder, content.picture) if content.picture else None
    txt = content.text(rng.getrandbits(48)) if content.text else None
    while txt is not None and txt in used:
        txt = content.text(rng.getrandbits(48)) if content.text else None
    return Entry(txt, img_path)


def _twin(album: Album, entry: Entry) -> Entry:
    return Entry(entry.txt, album.copy(entry.img_path) if entry.img_path else None)


def _asked(
    album: Album, task: Task, folder: str, content: Content, positive: Entry, rng: random.Random
) -> Asked:
    txt = content.text(rng.getrandbits(48)) if content.text else None
    while txt is not None and txt == positive.txt and content.text:
        txt = content.text(rng.getrandbits(48))
    return Asked(task, txt, album.shown(folder, content.picture) if content.picture else None, [positive])


def _share_pages(plan: Plan, split: str, share: float) -> None:
    """OVEN and InfoSeek speak of one encyclopedia: a positive of one may stand in the other's pool too."""
    for task in world_tasks():
        if task.dataset not in _SHARING:
            continue
        other = TASK_BY_NAME[f"{_SHARING[task.dataset]}_task{task.task_id}"]
        pool = plan.pools[other.name, pool_part(other, split)]
        for query, is_shared in zip(plan.queries[task.name, split], _spread(share), strict=False):
            if is_shared:
                page = Entry(query.positives[0].txt, query.positives[0].img_path)
                query.positives.append(page)
                pool.append(page)


def _give_numbers(plan: Plan) -> None:
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


def _add_sentences(plan: Plan, deck: Deck, *, count: int) -> None:
    rng = deck.rng
    for _ in range(count):
        scene = deck.scene()
        first = second = wording.describe(scene, seed=rng.getrandbits(48))
        while second == first:
            second = wording.describe(scene, seed=rng.getrandbits(48))
        (other,) = deck.near_misses(scene, 1)
        plan.sentences.append((first, second, wording.describe(other, seed=rng.getrandbits(48))))


def _add_captions(plan: Plan, deck: Deck, *, count: int, renderings: int) -> None:
    for _ in range(count):
        scene = deck.scene()
        for _ in range(renderings):
            caption = wording.describe(scene, seed=deck.rng.getrandbits(48))
            plan.captions.append((plan.album.new("cc3m/images", scene), caption))
    plan.rng.shuffle(plan.captions)


def count_copies(plan: Plan, split: str) -> dict[str, int | float | bool]:
    """How many equivalents and twins a split's pools hold, also per query, and whether they are positives."""
    queries = [query for (_, part), found in plan.queries.items() if part == split for query in found]
    return {
        "queries": len(queries),
        "equivalents": (num_equivalents := sum(query.num_equivalents for query in queries)),
        "equivalents_per_query": num_equivalents / len(queries),
        "twins": (num_twins := sum(query.num_twins for query in queries)),
        "twins_per_query": num_twins / len(queries),
        "listed_as_positives": split != "train",
    }
