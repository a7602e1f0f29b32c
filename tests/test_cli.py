"""The command line as its users meet it: help at once, and every fault in one line before anything starts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from fixtures_run import TinyRun, rewrite

from umarvel_ray.cli import main
from umarvel_ray.data.mbeir import TASK_BY_NAME, Mbeir
from umarvel_ray.data.sources import local_pool_source, query_source
from umarvel_ray.retrieve.store import finish_store, plan_shards, write_shard

ROOT = Path(__file__).parents[1]
JOBS = ("train", "embed", "search", "mine", "rerank", "evaluate", "report", "compare")
COMMANDS = ("run", "check", "demo", "negatives", "sweep", *JOBS)


def umarvel(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, output and errors of one command, in this process."""
    try:
        main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line with which a command is refused."""
    code, _, errors = umarvel(capsys, *arguments)
    assert code == 2
    [line] = errors.splitlines()
    assert line.startswith("umarvel: ")
    return line.removeprefix("umarvel: ")


def test_help_comes_at_once_and_loads_nothing_heavy():
    program = (
        "import sys\n"
        "from umarvel_ray.cli import main\n"
        f"for command in {COMMANDS!r}:\n"
        "    main([command, '--help'])\n"
        "print(sorted({'torch', 'transformers', 'ray', 'matplotlib'} & set(sys.modules)))\n"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    for command in COMMANDS:
        assert f"Usage: umarvel {command}" in done.stdout
    # All ten together; one alone takes half a second.
    assert seconds < 2 * len(COMMANDS)


def test_every_command_says_what_it_takes(capsys):
    code, output, _ = umarvel(capsys, "--help")
    assert code == 0
    assert all(re.search(rf"\b{command} ", output) for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rum"], "No such command 'rum'"),
        (["run"], "Missing argument"),
        (["run", "{config}", "--fast"], "No such option: --fast"),
        (["check", "{config}", "--images", "all"], "'all' is not one of 'none', 'exists', 'decode'"),
    ],
)
def test_a_wrong_call_is_refused(capsys, tiny: TinyRun, arguments, said):
    assert said in refusal(capsys, *(a.format(config=tiny.config) for a in arguments))


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stages.hard.train.steps=3"], r"run\.yaml.*: unknown setting 'stages\.hard\.train\.steps'"),
        (["seed=x", "dtype=int8"], r"setting 'seed'.*given 'x' \(2 faults in all\)"),
        (["stages.hard.train.batch_size"], r"override 'stages\.hard\.train\.batch_size' is not of the form"),
        (["data.tasks.9=a"], r"'9' is not an index into a list of 6"),
        (["retrieval.depth=4"], r"retrieval\.depth is 4, but hit@10 .* are reported: give at least 10"),
        (["stages.distil.depth=50"], r"stages\.distil\.depth is 50, but retrieval\.depth keeps 10 hits"),
        (["stages.hard.mining.rule=none"], r"'stages\.hard\.mining': rule 'none' takes no value"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named(capsys, tiny: TinyRun, command, overrides, said):
    line = refusal(capsys, command, tiny.config, *overrides)
    assert re.search(said, line), line


def test_the_demonstration_draws_nothing_for_a_wrong_setting(capsys, tmp_path):
    line = refusal(capsys, "demo", "--output", tmp_path / "demo", "stages.hard.num_negative=3")
    assert "unknown setting 'stages.hard.num_negative'" in line
    assert os.listdir(tmp_path) == []


def test_a_config_that_is_no_config_is_named_by_its_line(capsys, tiny: TinyRun, tmp_path):
    assert "nowhere.yaml: the config cannot be read (No such file" in refusal(capsys, "run", "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("title: a\nseed: [1\nstages: {}\n")
    assert re.search(r"broken\.yaml:\d: not valid YAML", refusal(capsys, "run", broken))
    values = yaml.safe_load(tiny.config.read_text())
    values["stages"]["hard"]["minning"] = values["stages"]["hard"].pop("mining")
    lines = yaml.safe_dump(values, sort_keys=False).splitlines()
    broken.write_text("\n".join(lines))
    line = refusal(capsys, "run", broken)
    assert "2 faults" in line
    assert re.search(r"broken\.yaml:\d+: ", line), line


def first_line_of(path: Path) -> dict:
    return json.loads(path.read_text().splitlines()[0])


def change_line(path: Path, number: int, change: Callable[[dict], object]) -> None:
    """Change the JSON object of one line, from 1; a string takes the line's place as it is."""
    lines = path.read_text().splitlines()
    value = json.loads(lines[number - 1])
    changed = change(value)
    lines[number - 1] = changed if isinstance(changed, str) else json.dumps(value)
    rewrite(path, "\n".join(lines) + "\n")


def _queries(run: TinyRun, split: str = "test", task: str = "mscoco_task0") -> Path:
    mbeir = Mbeir(run.root)
    known = TASK_BY_NAME[task]
    return (
        mbeir.training_queries_path(known.dataset) if split == "train" else mbeir.queries_path(known, split)
    )


def _pool(run: TinyRun, split: str = "test", task: str = "mscoco_task0") -> Path:
    mbeir = Mbeir(run.root)
    return (
        mbeir.global_pool_path("train")
        if split == "train"
        else mbeir.local_pool_path(TASK_BY_NAME[task], split)
    )


def lost_picture(run: TinyRun) -> str:
    image = first_line_of(_pool(run))["img_path"]
    (run.root / image).unlink()
    return rf"mbeir_\w+_cand_pool\.jsonl:\d+: the image is missing: \S*{image}\. Unpack the images"


def broken_line(run: TinyRun) -> str:
    change_line(_queries(run, "val"), 2, lambda line: '{"qid": "9:1", ')
    return rf"{_queries(run, 'val').name}:2: not valid JSON: .* Mend the line"


def strange_positive(run: TinyRun) -> str:
    change_line(_queries(run, "train"), 3, lambda line: line.update(pos_cand_list=["9:99999"]))
    rule = "a positive outside the global pool: candidate 9:99999 of query"
    return rf"{_queries(run, 'train').name}:3: {rule} \S+"


def repeated_did(run: TinyRun) -> str:
    path = _pool(run)
    rewrite(path, path.read_text() + path.read_text().splitlines()[0] + "\n")
    return rf"{path.name}:\d+: a did repeats: the did of line 1 stands here again"


def wrong_modality(run: TinyRun) -> str:
    change_line(_queries(run), 1, lambda line: line.update(query_modality="picture"))
    return rf"{_queries(run).name}:1: .*'picture'"


def empty_pool(run: TinyRun) -> str:
    rewrite(_pool(run, "train"), "")
    return rf"{_pool(run, 'train').name}: empty: it has no line"


def missing_column(run: TinyRun) -> str:
    path = run.home / "world/nli/nli_for_simcse.csv"
    rewrite(path, path.read_text().replace("sent1", "sentence1", 1))
    return r"nli_for_simcse\.csv:1: no column 'sent1' among .* Give a file with"


def caption_without_picture(run: TinyRun) -> str:
    path = run.home / "world/cc3m/chat.json"
    entries = json.loads(path.read_text())
    entries[4]["image"] = "images/nowhere.jpg"
    rewrite(path, json.dumps(entries))
    return r"chat\.json: the image is missing: .*nowhere\.jpg"


def no_backbone(run: TinyRun) -> str:
    (run.home / "backbone").unlink()
    return r"backbone: no config\.json there"


def no_test_files(run: TinyRun) -> str:
    for path in (run.root / "query/test").glob("*.jsonl"):
        path.unlink()
    return r"test"


FAULTS = [
    lost_picture, broken_line, strange_positive, repeated_did, wrong_modality, empty_pool, missing_column,
    caption_without_picture, no_backbone, no_test_files,
]  # fmt: skip


@pytest.mark.parametrize("spoil", FAULTS, ids=lambda spoil: spoil.__name__)
def test_a_run_over_faulty_data_ends_before_it_starts(capsys, tiny: TinyRun, tmp_path, spoil):
    """`run` names the first fault; `check` all; neither leaves an output folder."""
    run = tiny.copy(tmp_path / "spoiled")
    said = spoil(run)
    line = refusal(capsys, "run", run.config)
    assert re.search(said, line), line
    code, output, errors = umarvel(capsys, "check", run.config)
    assert (code, errors) == (2, "")
    *faults, last = output.splitlines()
    assert any(re.search(said, fault) for fault in faults), output
    assert re.fullmatch(r"\d+ faults?", last) and int(last.split()[0]) == len(faults)
    assert len(faults) == 1 or f"({len(faults)} faults in all; `umarvel check` lists them.)" in line
    assert not Path(run.home / "run").exists()


def test_an_unknown_task_is_named_with_those_there_are(capsys, tiny: TinyRun):
    line = refusal(capsys, "run", tiny.config, "data.tasks=[mscoco_task0, flickr]")
    assert "1 of 2 tasks have no test file (first: flickr). There are: visualnews_task0, mscoco_task0" in line


def test_check_finds_no_fault_where_there_is_none(capsys, tiny: TinyRun):
    code, output, _ = umarvel(capsys, "check", tiny.config, "--images", "decode")
    assert (code, output) == (0, "6 tasks, 40 sentence pairs, 40 captions: no faults found\n")


def test_a_truncated_picture_is_found_by_decoding_or_on_the_way(capsys, tiny: TinyRun, tmp_path):
    run = tiny.copy(tmp_path / "spoiled")
    broken = run.home / "world/cc3m" / json.loads((run.home / "world/cc3m/chat.json").read_text())[0]["image"]
    content = broken.read_bytes()
    rewrite(broken, content[: len(content) // 2])
    code, output, _ = umarvel(capsys, "check", run.config, "--images", "decode")
    assert code == 2
    assert re.search(rf"chat\.json: the image is broken: \S*{broken.name}: .*truncated", output), output
    # A run looks at names alone; it meets the picture in stage 1b, and goes on once the file is mended.
    stage = [
        "stages.text.train.num_steps=1",
        "stages.align.train.num_epochs=1",
        "stages.align.train.num_steps=null",
    ]
    line = refusal(capsys, "run", run.config, *stage)
    assert broken.name in line and "truncated" in line


def test_a_folder_of_someone_else_is_left_alone(capsys, tiny: TinyRun, tmp_path):
    (tmp_path / "thesis.tex").write_text("…")
    line = refusal(capsys, "run", tiny.config, f"output={tmp_path}")
    assert (
        f"{tmp_path}: holds 1 files that are not ours (first: thesis.tex). Give another output folder."
        in line
    )
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_folder_of_another_run_is_refused_by_what_differs(capsys, tiny: TinyRun, tmp_path):
    from umarvel_ray.artifacts import write_json
    from umarvel_ray.pipeline.check import RUN_FILE, run_claim

    write_json(tmp_path / RUN_FILE, run_claim(tiny.settings(tmp_path)))
    changes = [f"output={tmp_path}", "seed=7", "stages.hard.num_negatives=1"]
    for command in ("run", "check"):
        code, output, errors = umarvel(capsys, command, tiny.config, *changes)
        assert code == 2
        said = "made with other settings: 2 differ (first: seed was 0, is 7). Give another output folder"
        assert f"{tmp_path}: {said}" in output + errors


def test_a_checkpoint_made_with_other_settings_is_refused(capsys, tiny: TinyRun, tmp_path):
    from umarvel_ray.model.encoder import Encoder

    Encoder.load(str(tiny.home / "backbone")).save(tmp_path / "checkpoint")
    values = {
        "start": "checkpoint",
        "output": "stage",
        "seed": 0,
        "data": {"kind": "nli", "path": str(tiny.home / "world/nli/nli_for_simcse.csv")},
        "train": {"batch_size": 4, "num_steps": 1, "learning_rate": 1e-3, "trainable": "full"},
        "encoder": {"attention": "causal"},
        "runtime": {"kind": "local"},
    }
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(values))
    line = refusal(capsys, "train", config)
    assert f"{tmp_path / 'checkpoint'}" in line and "attention" in line
    # Refused at the door: with its own settings the same folder is taken.
    code, _, errors = umarvel(capsys, "train", config, "encoder=null")
    assert code == 0, errors
    line = refusal(capsys, "train", config, "encoder=null", "train.num_steps=2")
    assert "made with other settings: 1 differ (first: settings.train.num_steps was 1, is 2)" in line


def test_a_vector_that_is_not_finite_is_refused_by_search(capsys, tiny: TinyRun, tmp_path):
    mbeir, task = Mbeir(tiny.root), TASK_BY_NAME["mscoco_task0"]
    rng = np.random.default_rng(0)
    sources = [query_source(mbeir, task, "test"), local_pool_source(mbeir, task, "test")]
    for source in sources:
        folder, plan = tmp_path / "embeddings" / source.name, plan_shards(len(source), 100)
        records = [source[row] for row in range(len(source))]
        ids = [getattr(record, "qid", None) or record.did for record in records]  # type: ignore[union-attr]
        vectors = rng.standard_normal((len(ids), 8)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        write_shard(folder, plan[0], ids, vectors, dtype="float32", fingerprint="f")
        finish_store(folder, plan, fingerprint="f", settings={})
    values = {
        "embeddings": "embeddings",
        "root": str(tiny.root),
        "requests": [{"split": "test", "scopes": ["local"], "depth": 10}],
        "tasks": ["mscoco_task0"],
        "runtime": {"kind": "local"},
    }
    config = tmp_path / "search.yaml"
    config.write_text(yaml.safe_dump(values))
    code, _, errors = umarvel(capsys, "search", config, f"output={tmp_path / 'sound'}")
    assert code == 0, errors
    shard = tmp_path / "embeddings" / sources[1].name / "shard-00000.arrow"
    content = shard.read_bytes()
    place = content.index(vectors[2, 3].tobytes())
    shard.write_bytes(content[:place] + np.float32("nan").tobytes() + content[place + 4 :])
    line = refusal(capsys, "search", config, f"output={tmp_path / 'spoiled'}")
    assert "pools/mscoco_task0_test: 1 of 9 vectors" in line
    assert "(first: 9:9 is not finite)" in line


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "ray"])
def test_ctrl_c_ends_with_one_line(tiny: TinyRun, tmp_path, kind):
    output = tmp_path / "run"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "umarvel_ray.cli", "run", str(tiny.config)),
            *(f"output={output}", f"runtime={{kind: {kind}}}", "stages.text.train.num_steps=2000"),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("▸"):
            break
    deadline = time.monotonic() + 60
    while kind == "ray" and not (output / "train/text/metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "umarvel: stopped; the same command goes on from here.\n"
