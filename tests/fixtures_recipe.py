"""The recipe done once in this process, and what it means that another run is equal to it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fixtures_run import CONTROLS, Lines, TinyRun

from umarvel_ray.artifacts import read_json
from umarvel_ray.pipeline.run import run_recipe
from umarvel_ray.pipeline.settings import RunConfig

COLUMNS = ("instruct", "hard", "reranked", "distil", "distil_reranked")
ALL_CONTROLS = f"controls=[{', '.join(CONTROLS)}]"


@pytest.fixture(scope="session")
def finished(tiny: TinyRun) -> tuple[RunConfig, Lines]:
    """The recipe with all controls, in this process, and what it said."""
    view = Lines()
    settings = tiny.settings(tiny.home / "local", ALL_CONTROLS)
    run_recipe(settings, view)
    return settings, view


def figures(output: Path, column: str) -> dict[str, Any]:
    """What a person reads of a column: the measured tasks and their means."""
    results = read_json(output / "evaluate" / column / "results.json")
    return {key: results[key] for key in ("tasks", "mean")}


def weights(output: Path) -> dict[str, bytes]:
    """Every finished checkpoint's weights, by the stage's name."""
    return {path.parts[-3]: path.read_bytes() for path in output.glob("train/*/checkpoint/model.safetensors")}


def losses(output: Path) -> dict[str, list[dict[str, Any]]]:
    """Every line of every stage's metrics but how fast it went."""
    clocks = {"queries_per_s", "waited_s"}
    found = {}
    for path in output.glob("train/*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.parent.name] = [{k: v for k, v in line.items() if k not in clocks} for line in lines]
    return found


def arrow_table(path: Path) -> pa.Table:
    """A run, or the scores that a re-ranked one is made of."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def require_equal(output: Path, other: Path, columns: Sequence[str] = COLUMNS) -> None:
    """Everything that `output` holds is in `other` to the last bit: losses, weights, vectors, lists."""
    stages = {path.parent.name for path in output.glob("train/*/metrics.jsonl")}
    is_whole = "distil" in columns
    assert stages >= {"text", "align", "instruct", "hard", *(("reranker", "distil") if is_whole else ())}
    for of in (losses, weights):
        found, wanted = of(output), of(other)
        assert found == {stage: wanted[stage] for stage in stages}
    shards = [path.relative_to(output) for path in output.glob("embed/**/shard-*.arrow")]
    assert len(shards) > (30 if is_whole else 20)
    for shard in shards:
        assert (output / shard).read_bytes() == (other / shard).read_bytes(), shard
    for pattern in ("search/**/*.arrow", "mine/*/negatives.arrow", *(["rerank/**/*.arrow"] * is_whole)):
        runs = [path.relative_to(output) for path in output.glob(pattern)]
        assert runs
        for run in runs:
            assert arrow_table(output / run).equals(arrow_table(other / run)), run
    for column in columns:
        assert figures(output, column) == figures(other, column)
