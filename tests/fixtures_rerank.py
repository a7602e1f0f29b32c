"""A run of TREC's with queries, pool and judgements, for the reranker's jobs: pictures, words and both."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from umarvel_ray.config import build_config
from umarvel_ray.data.mbeir import write_pool
from umarvel_ray.data.records import Candidate
from umarvel_ray.retrieve.settings import RerankConfig

NUM_QUERIES, DEPTH = 11, 5


@dataclass(frozen=True)
class ListFiles:
    """Where everything is.

    Attributes:
        home: The folder of all.
        backbone: An untrained reranker.
    """

    home: Path
    backbone: str

    def config(self, output: Path, **settings: Any) -> RerankConfig:
        """Score the run."""
        one = {
            "name": "mine",
            "run": str(self.home / "run.trec"),
            "queries": str(self.home / "queries.jsonl"),
            "pools": [str(self.home / "pool.jsonl")],
            "root": str(self.home),
            "instruction": "Find it.",
            "depth": DEPTH - 1,
            "split": settings.pop("split", "test"),
            "qrels": settings.pop("qrels", None),
        }
        base = {"checkpoint": self.backbone, "output": str(output), "lists": [one], "seed": 0, "alpha": 0.5}
        return build_config(base | {"queries_per_shard": 3} | settings, RerankConfig)


@pytest.fixture(scope="session")
def list_files(
    tmp_path_factory: pytest.TempPathFactory, backbone: str, pictures: dict[str, str]
) -> ListFiles:
    """Eleven queries over twelve candidates; the last query has one hit."""
    home = tmp_path_factory.mktemp("lists")
    rng = np.random.default_rng(0)
    paths = list(pictures.values())
    candidates = [
        Candidate(
            did=f"d{number}",
            txt=None if number % 3 == 0 else " ".join(rng.choice(["kite", "hill", "red"], size=number)),
            img_path=paths[number % len(paths)] if number % 3 != 1 else None,
        )
        for number in range(12)
    ]
    write_pool(home / "pool.jsonl", candidates, home)
    with open(home / "queries.jsonl", "w") as queries, open(home / "run.trec", "w") as run:
        for number in range(NUM_QUERIES):
            line = {"qid": f"q{number}", "txt": f"query {number}"}
            if number % 2:
                line |= {"img_path": paths[number % len(paths)], "instruction": "Show it."}
            queries.write(json.dumps(line) + "\n")
            hits = rng.permutation(12)[: 1 if number == NUM_QUERIES - 1 else DEPTH]
            for rank, hit in enumerate(hits, start=1):
                run.write(f"q{number} Q0 d{hit} {rank} {1 - rank / 10:.3f} x\n")
    (home / "qrels.txt").write_text("".join(f"q{n} 0 d{n} 1 0\n" for n in range(NUM_QUERIES)))
    return ListFiles(home, backbone)
