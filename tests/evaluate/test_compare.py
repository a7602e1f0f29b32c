"""The comparison: intervals that cover what they claim, only like with like, one page without outside
help."""

import json
import re

import numpy as np
import pyarrow as pa
import pytest

from umarvel_ray.artifacts import read_json, write_json
from umarvel_ray.config import build_config
from umarvel_ray.errors import ConfigError, DataError
from umarvel_ray.evaluate.benchmark import results_document
from umarvel_ray.evaluate.compare import (
    CompareInputs,
    build_comparison,
    forest,
    paired_difference,
    query_table,
)

EVIL = '<script>alert("x")</script>'


def table_of(values, pool="local"):
    return {
        (task, pool): {f"q{n}": (float(v), 1 if v else 0) for n, v in enumerate(row)}
        for task, row in values.items()
    }


def test_the_difference_is_that_of_the_means_over_tasks():
    left = table_of({"a": [1, 1, 0, 0], "b": [1]})
    right = table_of({"a": [1, 0, 0, 0], "b": [0]})
    found = paired_difference([left], [right], "local")
    assert found["difference"] == pytest.approx((0.25 + 1.0) / 2)
    assert (found["tasks"], found["queries"]) == (2, 5)
    assert paired_difference([left], [right], "local", tasks=["a"])["difference"] == pytest.approx(0.25)
    assert paired_difference([left], [left], "local")["high"] == 0.0


def test_the_interval_is_about_as_wide_as_theory_says_and_pairing_narrows_it():
    rng = np.random.default_rng(0)
    base = rng.random(2000) < 0.5
    better = base | (rng.random(2000) < 0.1)
    found = paired_difference([table_of({"a": better})], [table_of({"a": base})], "local")
    difference = better.astype(float) - base
    half = 1.96 * difference.std(ddof=1) / 2000**0.5
    assert (found["high"] - found["low"]) / 2 == pytest.approx(half, rel=0.12)  # 1,000 draws
    other = rng.permutation(base)
    unpaired = paired_difference([table_of({"a": better})], [table_of({"a": other})], "local")
    assert found["high"] - found["low"] < unpaired["high"] - unpaired["low"]


def test_seeds_widen_the_interval():
    rng = np.random.default_rng(1)
    base = rng.random(400) < 0.5
    seeds = [table_of({"a": base | (rng.random(400) < gain)}) for gain in (0.0, 0.4)]
    both = paired_difference(seeds, [table_of({"a": base})] * 2, "local")
    one = paired_difference(seeds[1:], [table_of({"a": base})], "local")
    assert both["high"] - both["low"] > one["high"] - one["low"]


def test_other_queries_and_no_common_task_are_refused():
    with pytest.raises(DataError, match="measured on other queries"):
        paired_difference([table_of({"a": [1, 0]})], [table_of({"a": [1]})], "local")
    with pytest.raises(DataError, match="no task was measured by both"):
        paired_difference([table_of({"a": [1]})], [table_of({"b": [1]})], "local")


def write_side(folder, stage, values, *, pools="p", text="mscoco_task0"):
    """An evaluation's folder as the job leaves it."""
    folder.mkdir(parents=True)
    tasks, rows = {}, []
    for task, row in values.items():
        tasks[task] = {
            "kind": "text → image",
            "headline": "hit@5",
            "num_queries": len(row),
            "local": {"hit@5": float(np.mean(row)), "histograms": None},
        }
        rows += [(task, "local", f"{task}:{n}{EVIL}", float(v), 1 if v else 9) for n, v in enumerate(row)]
    settings = {
        "data": {"kind": "mbeir", "root": "/nowhere", "split": "test", "pools": {"x": pools}},
        "runs_folder": "/r",
    }
    document = results_document(
        tasks, stage=stage, checkpoint={"path": stage}, settings=settings, versions={"torch": "1"}
    )
    write_json(folder / "results.json", document)
    columns = dict(zip(("task", "pool", "qid", "value", "rank"), zip(*rows, strict=True), strict=True))
    table = pa.table({name: list(column) for name, column in columns.items()})
    with (
        pa.OSFile(str(folder / "queries.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table)
    return str(folder)


def inputs(*folders, **values):
    return build_config(
        {"title": f"A {EVIL}", "sides": [{"folder": folder} for folder in folders]} | values, CompareInputs
    )


@pytest.fixture
def sides(tmp_path):
    base = {"mscoco_task0": [1, 0, 0, 1, 0, 0, 1, 0], "flickr30k: text → image": [1, 1, 0, 0]}
    gain = {"mscoco_task0": [1, 1, 1, 1, 1, 1, 1, 0], "flickr30k: text → image": [1, 0, 0, 0]}
    return write_side(tmp_path / "a", "first", base), write_side(tmp_path / "b", f"second {EVIL}", gain)


def test_the_page_says_who_is_ahead_and_which_queries_changed(sides, tmp_path):
    summary = build_comparison(inputs(*sides, published=True), tmp_path / "out")
    assert summary["baseline"] == "first"
    by_task = {entry["task"]: entry for entry in summary["tasks"]}
    assert by_task["mscoco_task0"]["difference"] == pytest.approx(0.5)
    assert (by_task["mscoco_task0"]["queries_up"], by_task["mscoco_task0"]["queries_down"]) == (4, 0)
    assert by_task["flickr30k: text → image"]["queries_down"] == 1
    assert read_json(tmp_path / "out" / "compare.json") == json.loads(json.dumps(summary))
    assert {item["key"] for item in summary["settings_that_differ"]} == {"checkpoint.path"}
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count("found now</td>") == 4 and page.count("lost now</td>") == 1
    assert "published, Table 7" in page and "Tables 8 and 9" in page
    again = build_comparison(inputs(*sides, published=True), tmp_path / "again")
    assert again == summary and (tmp_path / "again" / "compare.html").read_text() == page


def test_the_page_stands_alone_and_runs_one_script_of_its_own(sides, tmp_path):
    import base64
    import hashlib

    build_comparison(inputs(*sides), tmp_path / "out")
    page = (tmp_path / "out" / "compare.html").read_text()
    assert EVIL not in page and "alert(&#34;x&#34;)" in page
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.S)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.replace("&#39;", "'")
    assert not re.search(r'(src|href)="(?!data:|#)', page)


def test_only_like_is_compared_with_like(sides, tmp_path):
    other = write_side(tmp_path / "c", "third", {"mscoco_task0": [1] * 8}, pools="other")
    with pytest.raises(DataError, match="1 pools differ in content between first and third"):
        build_comparison(inputs(sides[0], other), tmp_path / "out")
    with pytest.raises(DataError, match="baseline 5 of 2 sides"):
        build_comparison(inputs(*sides, baseline=5), tmp_path / "out")
    (tmp_path / "a" / "queries.arrow").unlink()
    with pytest.raises(DataError, match="no table of queries"):
        query_table(tmp_path / "a")
    with pytest.raises(ConfigError, match="sides"):
        inputs(sides[0])


def test_a_forest_colours_what_leaves_out_zero():
    plot = forest([("a", 0.1, 0.05, 0.15), ("b <", -0.1, -0.2, 0.1), ("mean", -0.1, -0.2, -0.05)], label="x")
    assert re.findall(r'class="dot (\w+)"', plot) == ["up", "flat", "down"]
    assert "b &lt;" in plot
