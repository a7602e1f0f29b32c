"""The report on a tiny world: the same every time, self-contained, and deaf to what captions try to do."""

import base64
import hashlib
import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest
from PIL import Image

from umarvel_ray.artifacts import write_json
from umarvel_ray.config import build_config
from umarvel_ray.data.mbeir import (
    TASK_BY_NAME,
    Mbeir,
    QueryRecord,
    write_instructions,
    write_pool,
    write_queries,
)
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.data.trec import Run, write_qrels
from umarvel_ray.errors import ConfigError, DataError
from umarvel_ray.evaluate.benchmark import assemble_results, evaluate_run
from umarvel_ray.evaluate.examples import MAX_LETTERS, Choice, choose, readable
from umarvel_ray.evaluate.figures import curve, histogram, ticks
from umarvel_ray.evaluate.report import ReportInputs, build_report

EVIL = '<script>alert("x")</script> | \u202e </p> {{ 7*7 }}'
NUM_QUERIES, DEPTH = 6, 12
RANKS = {"first": [9, 1, 0, 3, 2, 2], "last": [1, 8, 0, 3, 2, 1]}
TASKS = [TASK_BY_NAME[name] for name in ("mscoco_task0", "mscoco_task3")]


def write_world(root) -> None:
    """Candidate i is the one positive of query i; one picture is missing, one caption is hostile."""
    for task in TASKS:
        seeks_pictures = task.candidate_modality == "image"
        candidates, records = [], []
        for number in range(DEPTH + 3):
            did, path = f"9:{task.task_id}{number:02}", root / "images" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if number != 3:
                Image.new("RGB", (12, 8), (number * 15, 40, 90)).save(path)
            text = EVIL if number == 0 else f"candidate {number}"
            candidates.append(
                Candidate(did, img_path=str(path)) if seeks_pictures else Candidate(did, txt=text)
            )
            if number < NUM_QUERIES:
                query = (
                    Query(f"9:{number}", txt=EVIL)
                    if seeks_pictures
                    else Query(f"9:{number}", img_path=str(path))
                )
                records.append(QueryRecord(query, positives=(did,), task_id=task.task_id))
        mbeir = Mbeir(root)
        write_pool(mbeir.local_pool_path(task, "test"), candidates, root)
        write_queries(mbeir.queries_path(task, "test"), records, root)
        qrels = {record.query.qid: {record.positives[0]: 1} for record in records}
        write_qrels(mbeir.qrels_path(task, "test"), qrels)
    prompts = {
        (9, task.query_modality, task.candidate_modality): [f"Instruction of {task.name}."] for task in TASKS
    }
    write_instructions(mbeir.instructions_path(), prompts)


def write_stage(folder, mbeir: Mbeir, name: str) -> None:
    """Runs whose first positives stand at the ranks of `RANKS`, and their results."""
    measured = {}
    for task in TASKS:
        dids, qrels = mbeir.local_pool(task, "test").dids(), mbeir.qrels(task, "test")
        rows = []
        for qid, rank in zip(qrels, RANKS[name], strict=True):
            (positive,) = qrels[qid]
            others = [did for did in dids if did != positive][:DEPTH]
            rows.append([*others[: rank - 1], positive, *others[rank - 1 :]][:DEPTH] if rank else others)
        run = Run(list(qrels), rows, [[1 - place / 20 for place in range(DEPTH)]] * NUM_QUERIES)
        run.write(folder / name / f"{task.name}.local.arrow")
        measured[task.name] = {"local": evaluate_run(task, run, qrels, pool_dids=dids)}
    document = assemble_results(measured, stage=name, checkpoint={}, settings={}, versions={})
    write_json(folder / name / "results.json", document)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> ReportInputs:
    folder = tmp_path_factory.mktemp("report")
    (folder / "world").mkdir()
    write_world(folder / "world")
    for name in RANKS:
        write_stage(folder, Mbeir(folder / "world"), name)
    steps = [
        {"step": step, "loss": 5 - step / 100, "temperature": 0.05 - step / 1e4} for step in range(1, 201)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    mining = {
        "rule": "max_score",
        "threshold": 0.5,
        "histograms": {"bin_edges": [0, 0.5, 1], "positives": [1, 9], "kept": [30, 0], "dropped": [0, 10]},
        "counts": {"queries": 10, "dropped": {"above_threshold": 1234}},
    }
    write_json(folder / "mining.json", mining)
    curve = [[0.0, 0.22], [0.5, 0.4125], [1.0, 0.37]]
    write_json(folder / "alpha.json", {"alpha": 0.5, "curve": curve, "tasks": {}})
    return ReportInputs.model_validate(
        {
            "title": f"Tiny {EVIL}",
            "stages": [
                {
                    "name": "first",
                    "title": "First <i>",
                    "results": f"{folder}/first/results.json",
                    "runs": f"{folder}/first",
                },
                {
                    "name": "last",
                    "title": "Last",
                    "results": f"{folder}/last/results.json",
                    "runs": f"{folder}/last",
                },
            ],
            "training": [{"title": "First", "metrics": f"{folder}/metrics.jsonl"}],
            "mining": [{"title": "Mined", "report": f"{folder}/mining.json"}],
            "fusion": [{"title": "re-ranked", "alpha": f"{folder}/alpha.json"}],
            "data": f"{folder}/world",
            "facts": {"seed": 7, "machine": EVIL, "wall time": {"train": "2 s"}},
            "published": True,
        }
    )


class Page(HTMLParser):
    """Tags that must close, every address the page names, and its text."""

    VOID = ("meta", "img", "br", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [
            value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")
        ]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_one_whole_file_that_fetches_nothing_and_runs_its_own_filter_alone(inputs, tmp_path):
    build_report(inputs, tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    assert not page.tags & {"iframe", "object", "embed", "link", "base"}
    (script,) = re.findall(r"<script[^>]*>(.*?)</script>", html, flags=re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1])
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    assert "form-action 'none'" in policy
    assert page.addresses and all(address.startswith("data:image/webp;base64,") for address in page.addresses)
    assert not re.search(r"url\(|@import|javascript:", html)
    assert (
        '<script>alert("x")</script> | </p> {{ 7*7 }}' in page.text
    )  # a caption, without its direction mark
    assert "First <i>" in page.text


def test_the_page_tells_the_story(inputs, tmp_path):
    text = Page((build_report(inputs, tmp_path), (tmp_path / "report.html").read_text())[1]).text
    assert (
        "Last finds a right answer for 66.7 % of the queries in the pools of the tasks (±0.0 points)" in text
    )
    assert "rose most: rank 9 → 1" in text and "fell most: rank 1 → 8" in text
    assert "missed by both: rank past 12 → past 12" in text
    assert "rose for 2, fell for 1, stayed for 3 queries" in text
    assert "Instruction of mscoco_task0." in text
    assert "picture unreadable" in text and "1 picture could not be read" in text
    assert re.search(r"loss 4\.9\d → 3\.0\d · 200 steps", text)
    assert "filter 0.5" in text and "1,234" in text
    assert (
        "alpha 0.5: 0.4125 · best of the curve: 0.4125 · P(Yes) alone: 0.2200 · recall alone: 0.3700" in text
    )
    assert (
        "63.2" not in text and "84.4" in text
    )  # published tasks, but no mean over other tasks than measured


def test_the_same_inputs_give_the_same_bytes(inputs, tmp_path):
    for name in ("a", "b"):
        build_report(inputs, tmp_path / name)
    for file in ("report.html", "report.md", "report.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_markdown_and_json_carry_the_table(inputs, tmp_path):
    summary = build_report(inputs, tmp_path)
    assert summary == json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    lines = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if re.search(r"(?<!\\)\|", line)]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1  # every row has the same cells
    assert "| text → image | mscoco_task0 | hit@5 | **66.7** | **66.7** |" in rows
    assert summary["tasks"]["mscoco_task0"]["local"] == [4 / 6, 4 / 6]
    chosen = {item["qid"]: item["outcome"] for item in summary["examples"][0]["queries"]}
    assert chosen == {"9:0": "rose", "9:1": "fell", "9:2": "missed"}
    assert summary["examples"][0]["queries"][0]["retrieved_after"][0] == "9:000"
    assert [path.rsplit("/", 1)[1] for path in summary["unreadable_pictures"]] == ["3.png"]


def test_a_report_needs_no_more_than_results(inputs, tmp_path):
    bare = inputs.model_copy(
        update={"training": (), "mining": (), "fusion": (), "data": None, "facts": {}, "published": False}
    )
    assert build_report(bare, tmp_path)["examples"] == []
    text = Page((tmp_path / "report.html").read_text()).text
    assert "How training went" not in text and "before and after" not in text


def test_gains_are_counted_from_the_named_baseline(inputs, tmp_path):
    third = inputs.stages[0].model_copy(update={"name": "third", "title": "Third", "baseline": "first"})
    build_report(inputs.model_copy(update={"stages": (*inputs.stages, third)}), tmp_path)
    assert "vs First <i>" in Page((tmp_path / "report.html").read_text()).text


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (
            {"a": (8, 1), "b": (40, 30), "c": (2, 2)},
            [Choice("a", "rose", 8, 1), Choice("b", "missed", 40, 30)],
        ),
        ({"b": (0, 2), "a": (0, 2), "c": (50, 1)}, [Choice("c", "rose", 50, 1)]),
        ({"b": (1, 4), "a": (1, 4)}, [Choice("a", "fell", 1, 4)]),
        ({"a": (0, 0), "b": (9, 9)}, [Choice("a", "missed", 0, 0)]),
        ({"a": (1, 1)}, []),
    ],
)
def test_choice_goes_by_the_ratio_of_ranks_and_then_by_qid(ranks, expected):
    before, after = ({qid: pair[place] for qid, pair in ranks.items()} for place in (0, 1))
    assert choose(before, after, depth=50, k=5) == expected


def test_texts_are_cut_and_cleaned_of_marks_that_turn_the_page():
    assert readable("a\u202eb\x00c\n\nd") == "a b c d"
    assert readable("") is None
    long = readable("word " * 20_000)
    assert long is not None and len(long) <= MAX_LETTERS and long.endswith("…")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.5, 1]),
        (0.02, 0.05, [0.02, 0.03, 0.04, 0.05]),
        (-3, 3, [-2, 0, 2]),
        (0, 400, [0, 100, 200, 300, 400]),
    ],
)
def test_ticks_are_round_numbers_inside(low, high, expected):
    assert ticks(low, high) == expected


def test_plots_of_flat_and_empty_data_are_still_plots():
    for svg in (
        curve([1], [2.0], label="a"),
        curve([1, 2], [0.0, 0.0], label='"<b>"'),
        histogram([0, 1], {"kept": [0]}, stacked=["kept"], marks={}, label="a", x_label="b"),
    ):
        assert "nan" not in svg and "inf" not in svg
        assert Page(svg).open == []


def test_broken_inputs_are_named(inputs, tmp_path):
    broken = tmp_path / "metrics.jsonl"
    broken.write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo')
    training = inputs.training[0].model_copy(update={"metrics": str(broken)})
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not an object with a step"):
        build_report(inputs.model_copy(update={"training": (training,)}), tmp_path)
    gone = inputs.stages[0].model_copy(update={"results": str(tmp_path / "gone.json")})
    with pytest.raises(DataError, match=r"gone\.json: cannot be read"):
        build_report(inputs.model_copy(update={"stages": (gone,)}), tmp_path)
    with pytest.raises(ConfigError, match=r"no stage is called 'thrid'. Stages: first, last"):
        build_config({**inputs.model_dump(), "after": "thrid"}, ReportInputs)
    assert not (tmp_path / "report.html").exists()
