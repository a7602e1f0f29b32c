"""The demonstration world on disk: M-BEIR's files about small scenes, and the data of the stages before.

Twelve of M-BEIR's tasks, so that all eight kinds occur. Scenes come in families: one that is asked for and
its near misses, which stand in the same pool. Every scene of val and test is new to all training data, near
misses included.

A pool also holds *equivalents* (a positive's meaning drawn or worded anew) and *twins* (its very content
under another did). In training they are not listed as positives, as in found data, so that mining meets false
negatives; in val and test they are, so that the metric is fair.
"""

import csv
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from umarvel_ray.artifacts import atomic_folder, read_json, write_json
from umarvel_ray.data.mbeir import Mbeir, QueryRecord, write_instructions, write_pool, write_queries
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.data.trec import write_qrels
from umarvel_ray.demo import scenes
from umarvel_ray.demo.families import PROMPTS
from umarvel_ray.demo.plan import (
    MBEIR_FOLDER,
    UPSAMPLED,
    Asked,
    Drawing,
    Entry,
    Plan,
    WorldConfig,
    count_copies,
    make_plan,
    pool_part,
    world_tasks,
)
from umarvel_ray.errors import OutputError
from umarvel_ray.storage import Place

WORLD_FILE = "world.json"
SENTENCES_FILE = "nli/nli_for_simcse.csv"
CAPTIONS_FILE = "cc3m/chat.json"

Progress = Callable[[int, int], None]
"""Called with (pictures drawn, pictures in all)."""


def make_world(
    config: WorldConfig, output: Path, *, workers: int = 1, progress: Progress | None = None
) -> None:
    """Write the world under `output`, whole or not at all; a world that stands there is replaced.

    Args:
        config: What to write.
        output: Becomes `M-BEIR/`, `nli/`, `cc3m/` and `world.json`, which holds the settings, the number of
            records per file, and how many equivalents and twins there are.
        workers: Processes that draw; more than one are spawned, so the caller's main module must be
            importable.
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
        plan = make_plan(config)
        counts = _write_mbeir(plan, config, folder / MBEIR_FOLDER)
        counts[SENTENCES_FILE] = _write_sentences(plan, folder / SENTENCES_FILE)
        counts[CAPTIONS_FILE] = _write_captions(plan, folder / CAPTIONS_FILE)
        _draw_all(plan.album.drawings, config.pixels, folder, workers=workers, progress=progress)
        world = {
            "config": config.model_dump(),
            "records": counts,
            "pictures": len(plan.album.drawings),
            "copies": {split: count_copies(plan, split) for split in ("train", "val", "test")},
        }
        write_json(folder / WORLD_FILE, world)


def world_texts(output: Path) -> Iterator[str]:
    """Every text that training reads in the world under `output`, prompts included: for a vocabulary."""
    root = Mbeir(Path(output) / MBEIR_FOLDER)
    with open(Path(output) / SENTENCES_FILE, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield from row.values()
    for row in read_json(Path(output) / CAPTIONS_FILE):
        yield row["caption"]
    for record in root.union_training_queries():
        yield record.query.txt or ""
    for candidate in root.global_pool("train"):
        yield candidate.txt or ""
    for prompts in PROMPTS.values():
        yield from prompts


def read_world_config(output: Path) -> WorldConfig:
    """The settings of the world under `output`, to know whether it is the one that is wanted."""
    return WorldConfig.model_validate(read_json(Path(output) / WORLD_FILE)["config"])


def _write_mbeir(plan: Plan, config: WorldConfig, root: Path) -> dict[str, int]:
    """Write all files but the pictures.

    Returns:
        Records per file, by path from the world's folder; a query repeated in a union file counts each time.
    """
    root.mkdir(parents=True)
    files, counts = Mbeir(root), {}

    def count(path: Place, number: int) -> None:
        counts[path.relative_to(root.parent).as_posix()] = number

    def save_queries(path: Place, queries: list[Asked]) -> None:
        write_queries(path, [_query_record(query, root) for query in queries], root)
        count(path, len(queries))

    def save_qrels(path: Place, queries: list[Asked]) -> None:
        qrels = {query.qid: {entry.did: 1 for entry in query.positives} for query in queries}
        write_qrels(path, qrels, task_ids={query.qid: query.task.task_id for query in queries})
        count(path, sum(len(grades) for grades in qrels.values()))

    def save_pool(path: Place, pool: list[Entry]) -> None:
        world = root.parent
        write_pool(
            path, [Candidate(e.did, e.txt, e.img_path and str(world / e.img_path)) for e in pool], root
        )
        count(path, len(pool))

    union: list[Asked] = []
    for dataset in dict.fromkeys(task.dataset for task in world_tasks()):
        queries = [
            q for task in world_tasks() if task.dataset == dataset for q in plan.queries[task.name, "train"]
        ]
        plan.rng.shuffle(queries)
        save_queries(files.training_queries_path(dataset), queries)
        save_qrels(files.training_qrels_path(dataset), queries)
        repeats = int(len(queries) * config.upsampled) if dataset in UPSAMPLED else 0
        union += [*queries, *plan.rng.choices(queries, k=repeats)]
    save_queries(files.union_training_queries_path(), union)

    for task in world_tasks():
        for split in ("val", "test"):
            save_queries(files.queries_path(task, split), plan.queries[task.name, split])
            save_qrels(files.qrels_path(task, split), plan.queries[task.name, split])
            save_pool(files.local_pool_path(task, split), plan.pools[task.name, pool_part(task, split)])
    val_queries = [query for task in world_tasks() for query in plan.queries[task.name, "val"]]
    save_queries(root / "query/union_val/mbeir_union_val.jsonl", val_queries)

    def all_of(split: str) -> Iterator[Entry]:
        return (entry for task in world_tasks() for entry in plan.pools[task.name, pool_part(task, split)])

    named = {entry.did for query in val_queries for entry in query.positives}
    save_pool(files.global_pool_path("train"), _in_order(all_of("train")))
    save_pool(
        files.global_pool_path("val"), _in_order(entry for entry in all_of("val") if entry.did in named)
    )
    save_pool(files.global_pool_path("test"), _in_order(all_of("test")))
    write_instructions(
        files.instructions_path(),
        {(t.dataset_id, t.query_modality, t.candidate_modality): PROMPTS[t.name] for t in world_tasks()},
    )
    return counts


def _in_order(entries: Iterator[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: tuple(int(part) for part in entry.did.split(":")))


def _query_record(query: Asked, root: Path) -> QueryRecord:
    img_path = query.img_path and str(root.parent / query.img_path)
    return QueryRecord(
        query=Query(query.qid, query.txt, img_path),
        positives=tuple(entry.did for entry in query.positives),
        task_id=query.task.task_id,
    )


def _write_sentences(plan: Plan, path: Path) -> int:
    path.parent.mkdir(parents=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("sent0", "sent1", "hard_neg"))
        writer.writerows(plan.sentences)
    return len(plan.sentences)


def _write_captions(plan: Plan, path: Path) -> int:
    """A list of id, image (from the file's own folder) and caption, as LLaVA's pre-training set has it."""
    rows: list[dict[str, str]] = []
    for picture, caption in plan.captions:
        image = os.path.relpath(picture, os.path.dirname(CAPTIONS_FILE))
        rows.append({"id": Path(image).stem, "image": image, "caption": caption})
    write_json(path, rows)
    return len(rows)


def _draw_all(
    drawings: list[Drawing], pixels: int, folder: Path, *, workers: int, progress: Progress | None
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


def _draw_block(drawings: list[Drawing], *, pixels: int, folder: Path) -> int:
    for drawing in drawings:
        picture = scenes.draw(drawing.scene, seed=drawing.seed, pixels=pixels)
        # At this size, halved colour resolution would smear a small shape's colour over its neighbours.
        picture.save(folder / drawing.path, quality=90, subsampling=0)
    return len(drawings)
