"""A pool of millions of lines, from the bare file to shards that can be handed out: indexed, every id and
every copy looked for, cut. Against the list of dictionaries that people make of such a file.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

from umarvel_ray.bench.harness import Answer, Benchmark, BenchmarkError, Case, Prepared

_WORDS = (
    "a record of ordinary length, as the captions of the pools are, which says little but says it at length"
)


def _pool(case: Case) -> Path:
    """Lines of 200 bytes; every hundredth has the words of the one before."""
    folder = Path(tempfile.mkdtemp(prefix="umarvel-pool-"))
    with (folder / "pool.jsonl").open("w", encoding="utf-8") as file:
        for row in range(case["rows"]):
            number = row - (row % 100 == 99)
            line = {"did": f"9:{row + 1}", "txt": f"{_WORDS} {number}", "img_path": None, "modality": "text"}
            file.write(json.dumps(line) + "\n")
    return folder


def _ours(case: Case) -> Prepared:
    from umarvel_ray.retrieve.embed import digest_rows, find_copies, plan_stores, shard_tasks
    from umarvel_ray.retrieve.settings import EmbedConfig

    folder = _pool(case)
    config = EmbedConfig(
        checkpoint=str(folder), output=str(folder / "out"), root=str(folder), splits=(),
        pools=(str(folder / "pool.jsonl"),),
    )  # fmt: skip

    def run() -> Answer:
        shutil.rmtree(folder / ".pool.jsonl.index", ignore_errors=True)
        (plan,) = plan_stores(config)
        digests = np.empty((plan.num_rows, 3), dtype=np.uint64)
        for shard in plan.shards:
            digests[shard.start : shard.stop] = digest_rows(plan.source, shard.start, shard.stop)
        copies = find_copies(plan.source, digests)
        tasks = shard_tasks(plan, plan.shards, copies)
        return {"rows": np.array([plan.num_rows]), "copies": copies[0], "shards": np.array([len(tasks)])}

    return Prepared(run=run, work=case["rows"])


def _dictionaries(case: Case) -> Prepared:
    folder = _pool(case)

    def run() -> Answer:
        with open(folder / "pool.jsonl", encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
        if len({record["did"] for record in records}) != len(records):
            raise BenchmarkError("an id repeats.")
        first: dict[str, int] = {}
        copies = [row for row, record in enumerate(records) if first.setdefault(record["txt"], row) != row]
        shards = [records[start : start + 8192] for start in range(0, len(records), 8192)]
        return {
            "rows": np.array([len(records)]), "copies": np.array(copies), "shards": np.array([len(shards)]),
        }  # fmt: skip

    return Prepared(run=run, work=case["rows"])


def _compare(case: Case, ours: Answer, theirs: Answer) -> str:
    for key in ("rows", "copies", "shards"):
        if not np.array_equal(ours[key], theirs[key]):
            raise BenchmarkError(f"{key} differ.")
    return "same copies, same shards"


BENCHMARK = Benchmark(
    about="A pool file: indexed, ids and copies looked for, cut into shards",
    unit="rows",
    methods={"index": _ours, "list of dictionaries": _dictionaries},
    cases={"200k": {"rows": 200_000}, "5.6M": {"rows": 5_600_000}},
    quick=("200k",),
    compare=_compare,
    repeats=1,
    threads=1,
)
