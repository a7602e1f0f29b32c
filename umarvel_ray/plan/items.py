"""How many records there are and how long: by a sample of the data, or M-BEIR's published counts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from umarvel_ray.data.mbeir import TASKS, Mbeir, Task
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.data.sources import (
    Source,
    chosen_tasks,
    local_pool_source,
    pool_sources,
    query_source,
)
from umarvel_ray.data.text_pairs import CaptionPairs, NliPairs
from umarvel_ray.errors import UmarvelError
from umarvel_ray.model.settings import ImageSettings
from umarvel_ray.pipeline.settings import RunConfig
from umarvel_ray.plan.costs import shape_of
from umarvel_ray.storage import at, local_file

TEMPLATE_TOKENS = 22
"""System prompt, role markers and `<emb>` around every record, by Qwen2-VL's tokenizer."""
_CHARACTERS_PER_TOKEN = 4.2
"""Of English text, where the backbone's tokenizer is not here."""
_SAMPLE = 256
"""Records looked at of one file, evenly spread."""


@dataclass(frozen=True)
class Items:
    """Records of one kind.

    Attributes:
        rows: How many.
        tokens: Mean length in the decoder, template and image tokens included.
        images: Images per record.
        image_tokens: Mean tokens of an image.
        image_bytes: Mean size of its file.
    """

    rows: float
    tokens: float
    images: float = 0.0
    image_tokens: float = 0.0
    image_bytes: float = 0.0

    @property
    def own_tokens(self) -> float:
        """Mean length without the template: what a record adds to another's prompt."""
        return max(1.0, self.tokens - TEMPLATE_TOKENS)


def joined(parts: Sequence[Items]) -> Items:
    """All of them as one kind: means weighted by rows."""
    rows = sum(part.rows for part in parts)
    if not rows:
        return Items(0, 0)
    pictures = sum(part.rows * part.images for part in parts)

    def per_picture(value: Callable[[Items], float]) -> float:
        return sum(p.rows * p.images * value(p) for p in parts) / pictures if pictures else 0.0

    return Items(
        rows=rows,
        tokens=sum(p.rows * p.tokens for p in parts) / rows,
        images=pictures / rows,
        image_tokens=per_picture(lambda p: p.image_tokens),
        image_bytes=per_picture(lambda p: p.image_bytes),
    )


@dataclass(frozen=True)
class World:
    """Everything a run reads, by what it is for.

    Attributes:
        queries: By (split, task).
        pools: By (split, task): the local pool that the task searches.
        pool_names: By the same keys; tasks that share a pool share its name.
        sentences: Pairs of stage 1a: queries, then candidates.
        captions: Pairs of stage 1b.
        training: M-BEIR's training queries, then their candidates.
        measured: Whether lengths are the data's own.
    """

    queries: dict[tuple[str, str], Items]
    pools: dict[tuple[str, str], Items]
    pool_names: dict[tuple[str, str], str]
    sentences: tuple[Items, Items]
    captions: tuple[Items, Items]
    training: tuple[Items, Items]
    measured: bool

    def tasks(self, split: str) -> list[str]:
        """Tasks that have queries in a split."""
        return [task for of, task in self.queries if of == split]

    def distinct_pools(self, splits: Sequence[str]) -> list[Items]:
        """Pools of these splits, each once."""
        found = {name: self.pools[key] for key, name in self.pool_names.items() if key[0] in splits}
        return list(found.values())


def world_of(run: RunConfig, *, image_tokens: float) -> World:
    """Read counts and lengths from a run's data; take M-BEIR's published ones where it is not here."""
    if (at(run.data.root) / "query").is_dir():
        return _Sampler(run).world()
    return published_world(image_tokens, names=run.data.tasks)


class _Sampler:
    """Looks at a sample of every file."""

    def __init__(self, run: RunConfig) -> None:
        self._run = run
        self._count = token_counter(run.backbone)
        shape = shape_of(run.backbone)
        self._unit = shape.patch * shape.merge
        self._template = self._count(
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|im_end|>\n"
            "<|im_start|>assistant\n<|im_end|><|im_end|>"
        )

    def world(self) -> World:
        run = self._run
        mbeir = Mbeir(run.data.root)
        queries, pools, names = {}, {}, {}
        by_name: dict[str, Items] = {}
        for split in ("train", "val", "test"):
            try:
                tasks = chosen_tasks(mbeir, split, run.data.tasks)
            except UmarvelError:
                continue  # this part of the data is not here; jobs that need it say so
            # Tasks share pools, splits too: each is looked at once.
            for source in pool_sources(mbeir, split, tasks):
                if source.name not in by_name:
                    by_name[source.name] = self._source(source)
            for task in tasks:
                source = query_source(mbeir, task, split)
                queries[split, task.name] = self._source(source)
                names[split, task.name] = local_pool_source(mbeir, task, split).name
                pools[split, task.name] = by_name[names[split, task.name]]
        data = run.data
        return World(
            queries=queries,
            pools=pools,
            pool_names=names,
            sentences=self._pairs(lambda: NliPairs(data.nli, use_hard_negatives=False)),
            captions=self._pairs(lambda: CaptionPairs(data.captions, image_root=data.caption_images)),
            training=self._training(
                mbeir, [items for (split, _), items in queries.items() if split == "train"]
            ),
            measured=True,
        )

    def _source(self, source: Source) -> Items:
        return self._items(len(source), source.__getitem__)

    def _pairs(self, open_pairs: Callable[[], Any]) -> tuple[Items, Items]:
        try:
            pairs = open_pairs()
        except (UmarvelError, OSError):
            return Items(0, 0), Items(0, 0)
        return (
            self._items(len(pairs), lambda row: pairs[row].query),
            self._items(len(pairs), lambda row: pairs[row].positive),
        )

    def _training(self, mbeir: Mbeir, with_prompt: Sequence[Items]) -> tuple[Items, Items]:
        try:
            queries, pool = mbeir.union_training_queries(), mbeir.global_pool("train")
        except UmarvelError:
            return Items(0, 0), Items(0, 0)
        mean = joined(with_prompt)
        return (
            Items(len(queries), mean.tokens, mean.images, mean.image_tokens, mean.image_bytes),
            self._items(len(queries), lambda row: pool.get(queries[row].positives[0])),
        )

    def _items(self, rows: int, record: Callable[[int], Query | Candidate]) -> Items:
        step = max(1, rows // _SAMPLE)
        tokens, pictures = 0.0, []
        looked = range(0, rows, step)
        for row in looked:
            item = record(row)
            text = " ".join(filter(None, (getattr(item, "instruction", None), item.txt)))
            tokens += self._template + (self._count(text) if text else 0)
            if item.img_path:
                pictures.append(picture_size(item.img_path, self._run.encoder.images, self._unit))
                tokens += pictures[-1][0] + 2
        number = max(1, len(looked))
        return Items(
            rows=rows,
            tokens=tokens / number,
            images=len(pictures) / number,
            image_tokens=sum(p[0] for p in pictures) / max(1, len(pictures)),
            image_bytes=sum(p[1] for p in pictures) / max(1, len(pictures)),
        )


def picture_size(path: str, settings: ImageSettings | None = None, unit: int = 28) -> tuple[float, float]:
    """Tokens of an image and bytes of its file; the head of the file is read, no pixel is decoded."""
    from PIL import Image

    from umarvel_ray.model.images import resized_size

    try:
        bounds = (settings or ImageSettings()).model_dump()
        with at(path).open("rb") as file, Image.open(file) as image:
            height, width = resized_size(image.height, image.width, **bounds, unit=unit)
        return height * width / unit**2, at(path).stat().st_size
    except (OSError, UmarvelError):
        return 0.0, 0.0  # `umarvel check` names it


def token_counter(backbone: str) -> Callable[[str], int]:
    """Text → tokens, by the backbone's own tokenizer where it is here, else by its length."""
    if not backbone.startswith("hf://") and (file := at(backbone) / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(local_file(file)))
        return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
    return lambda text: max(1, round(len(text) / _CHARACTERS_PER_TOKEN))


_MBEIR: dict[str, tuple[float, float, float, float, int, int, int, int]] = {
    "visualnews_task0": (99e3, 20e3, 20e3, 542e3, 45, 0, 0, 1),
    "mscoco_task0": (100e3, 24.8e3, 24.8e3, 5e3, 35, 0, 0, 1),
    "fashion200k_task0": (15e3, 1.7e3, 1.7e3, 201e3, 30, 0, 0, 1),
    "webqa_task1": (16e3, 1.7e3, 2.4e3, 544e3, 45, 0, 110, 0),
    "edis_task2": (26e3, 3.2e3, 3.2e3, 1e6, 45, 0, 25, 1),
    "webqa_task2": (17e3, 1.7e3, 2.5e3, 403e3, 45, 0, 35, 1),
    "visualnews_task3": (100e3, 20e3, 20e3, 537e3, 22, 1, 25, 0),
    "mscoco_task3": (113e3, 5e3, 5e3, 25e3, 22, 1, 14, 0),
    "fashion200k_task3": (15e3, 4.8e3, 4.8e3, 61e3, 22, 1, 10, 0),
    "nights_task4": (16e3, 2e3, 2e3, 40e3, 22, 1, 0, 1),
    "oven_task6": (150e3, 50e3, 50e3, 676e3, 40, 1, 130, 0),
    "infoseek_task6": (141e3, 11e3, 11e3, 611e3, 42, 1, 130, 0),
    "fashioniq_task7": (16e3, 2e3, 6e3, 74e3, 45, 1, 0, 1),
    "cirr_task7": (26e3, 2e3, 4e3, 21e3, 40, 1, 0, 1),
    "oven_task8": (157e3, 14.7e3, 14.7e3, 335e3, 40, 1, 130, 1),
    "infoseek_task8": (143e3, 17.6e3, 17.6e3, 481e3, 42, 1, 130, 1),
}
"""Task → queries of train, val and test and pool (Table 10 of arXiv:2507.14902); tokens of a query's text and
its images, the same of a candidate. Counts are the paper's; lengths are assumptions, nobody measured them."""
TRAINING_QUERIES = 1.33e6
"""Lines of M-BEIR's union of training queries: small data sets stand in it more than once."""
TRAINING_POOL = 1.93e6
_IMAGE_BYTES = 25e3
_NLI_PAIRS, _CAPTIONS = 275_601, 595_375
"""Of SimCSE's file and of LLaVA's pre-training set."""


def published_world(image_tokens: float, *, names: Sequence[str] | None = None) -> World:
    """M-BEIR by its published counts and assumed lengths.

    Args:
        image_tokens: Of every image: a 256×340 picture has 108, the most allowed is 300.
        names: Tasks; all by default.
    """

    def items(rows: float, text: float, images: int) -> Items:
        tokens = TEMPLATE_TOKENS + text + images * (image_tokens + 2)
        return Items(rows, tokens, images, image_tokens if images else 0, _IMAGE_BYTES if images else 0)

    queries, pools, pool_names = {}, {}, {}
    chosen = [task for task in TASKS if names is None or task.name in names]
    share = TRAINING_POOL / sum(row[3] for row in _MBEIR.values())
    for task in chosen:
        *counts, pool, query_text, query_images, text, images = _MBEIR[task.name]
        for split, rows in zip(("train", "val", "test"), counts, strict=True):
            queries[split, task.name] = items(rows, query_text, query_images)
            # Training candidates are a third of the test pool's number; val and test share theirs.
            pools[split, task.name] = items(pool * share if split == "train" else pool, text, images)
            pool_names[split, task.name] = f"{'train/' if split == 'train' else ''}{task.name}"
    sides = [_training_sides(task, items) for task in chosen]
    training = (joined([query for query, _ in sides]), joined([candidate for _, candidate in sides]))
    scale = TRAINING_QUERIES / sum(row[0] for row in _MBEIR.values())
    return World(
        queries=queries,
        pools=pools,
        pool_names=pool_names,
        sentences=(items(_NLI_PAIRS, 20, 0), items(_NLI_PAIRS, 12, 0)),
        captions=(items(_CAPTIONS, 12, 0), items(_CAPTIONS, 0, 1)),
        training=(_scaled(training[0], scale), _scaled(training[1], scale)),
        measured=False,
    )


def _training_sides(task: Task, items: Callable[[float, float, int], Items]) -> tuple[Items, Items]:
    rows, _, _, _, query_text, query_images, text, images = _MBEIR[task.name]
    return items(rows, query_text, query_images), items(rows, text, images)


def _scaled(items: Items, factor: float) -> Items:
    return Items(items.rows * factor, items.tokens, items.images, items.image_tokens, items.image_bytes)
