"""The whole recipe on a world of a few dozen queries: from start to report, again, killed, and on Ray."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
from fixtures_recipe import COLUMNS, figures, losses, require_equal
from fixtures_run import CONTROLS, TASKS, Lines, TinyRun

from umarvel_ray.artifacts import is_finished
from umarvel_ray.pipeline.run import run_recipe
from umarvel_ray.pipeline.stages import recipe


def files_of(output: Path) -> dict[str, int]:
    """When each file was last written, in nanoseconds."""
    return {str(path): path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_from_start_to_report(finished):
    settings, view = finished
    output = Path(settings.output)
    jobs = recipe(settings)
    assert all(is_finished(job.config.output) for job in jobs)
    for column in (*COLUMNS, *CONTROLS):
        measured = figures(output, column)["tasks"]
        assert set(measured) == set(TASKS)
        assert all({"local", "global"} <= set(measured[task]) for task in TASKS)
    page = (Path(jobs[-1].config.output) / "report.html").read_text()  # type: ignore[attr-defined]
    assert all(task in page for task in TASKS)
    for name, count in {"text": 4, "instruct": 8, "hard": 3, "continue_hard": 3}.items():
        assert [line["step"] for line in losses(output)[name]] == list(range(1, count + 1))
    assert view.lines[0] == f"tiny run: {len(jobs)} jobs, 0 finished before, output {output}"
    assert view.lines[1].startswith("checked 6 tasks, 40 sentence pairs, 40 captions in ")
    for task in TASKS:
        assert sum(line.split()[:1] == [task] for line in view.lines) == 2  # local and global


@pytest.mark.slow
def test_the_controls_start_and_are_fed_as_they_should(finished):
    """Nothing but the part under test differs from the stage that a control stands beside."""
    settings, _ = finished
    jobs = {job.name: job.config.model_dump(mode="json", exclude={"output"}) for job in recipe(settings)}

    def differences(control: str, stage: str) -> set[str]:
        a, b = jobs[f"train/{control}"], jobs[f"train/{stage}"]
        keys = {f"{group}.{key}" for group in ("data", "loss") for key in a[group]}
        differing = {
            key
            for key in keys
            if a[key.split(".")[0]][key.split(".")[1]] != b[key.split(".")[0]][key.split(".")[1]]
        }
        return differing | {key for key in a if key not in ("data", "loss") and a[key] != b[key]}

    assert differences("in_batch", "hard") == {"data.lists", "data.num_negatives"}
    assert differences("unfiltered", "hard") == {"data.lists"}
    assert differences("own_negatives", "hard") == {"data.only_listed", "loss.negatives"}
    assert differences("continue_hard", "distil") == {
        "data.list_role", "data.only_listed", "data.teacher", "loss.kind", "loss.negatives",
    }  # fmt: skip
    losses_of = losses(Path(settings.output))
    first = {name: losses_of[name][0]["loss"] for name in ("hard", "in_batch", "unfiltered", "own_negatives")}
    assert len(set(first.values())) == 4


@pytest.mark.slow
def test_a_second_run_redoes_nothing(finished):
    settings, _ = finished
    before = files_of(Path(settings.output))
    view = Lines()
    run_recipe(settings, view)
    assert files_of(Path(settings.output)) == before
    jobs = recipe(settings)
    assert view.lines[0].startswith(f"tiny run: {len(jobs)} jobs, {len(jobs)} finished before")
    assert sum(line.endswith("finished before") for line in view.lines) == len(jobs)


@pytest.mark.slow
def test_one_job_that_is_lost_is_made_again_as_it_was(finished):
    """The others stay; what it writes again is the same to the byte."""
    settings, _ = finished
    output = Path(settings.output)
    before = files_of(output)
    lost = output / "mine" / "negatives"
    content = (lost / "negatives.arrow").read_bytes()
    for path in lost.iterdir():
        path.unlink()
    run_recipe(settings, Lines())
    assert (lost / "negatives.arrow").read_bytes() == content
    after = files_of(output)
    assert {path for path in before if before[path] != after[path]} == {
        str(lost / name) for name in ("job.json", "done.json", "negatives.arrow", "mining_report.json")
    }


class Process:
    """`umarvel run` in a process group of its own."""

    def __init__(self, tiny: TinyRun, output: Path, runtime: str, columns: Sequence[str]) -> None:
        command = [sys.executable, "-m", "umarvel_ray.cli", "run", str(tiny.config)]
        self._log = output.with_suffix(".log")
        self.left: list[psutil.Process] = []
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [*command, f"output={output}", f"runtime={runtime}", f"columns=[{', '.join(columns)}]"],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=Path(__file__).parents[2],
            )

    def kill_when(self, is_time: Callable[[], bool]) -> None:
        """SIGKILL to the group, as soon as it is time; what Ray started has groups of its own and is left."""
        deadline = time.monotonic() + 120
        while not is_time():
            assert self._process.poll() is None, f"ended before it was time:\n{self._log.read_text()}"
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.003)
        self.left = psutil.Process(self._process.pid).children(recursive=True)
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def end(self) -> str:
        """Wait for a good end; everything it and its forerunners said."""
        code = self._process.wait(timeout=420)
        assert code == 0, self._log.read_text()
        return self._log.read_text()


_TRAINING = ("train/instruct/states/step-000002/state.json", "train/instruct")
_EMBEDDING = ("embed/instruct/*/*/*/shard-00000.arrow", "embed/instruct")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runtime", "columns", "moments"),
    [
        (
            "{kind: local, num_workers: 2}",
            COLUMNS,
            [
                _TRAINING,
                _EMBEDDING,
                ("evaluate/instruct/done.json", "train/hard"),
                ("train/reranker/states/step-000002/state.json", "train/reranker"),
                ("rerank/reranked/parts/*/*/00000.arrow", "rerank/reranked"),
            ],
        ),
        # Each start takes its time on Ray: half the recipe here, all of it with the tests of clusters.
        ("{kind: ray, num_workers: 2, num_actors: 2, readers: 0}", ("instruct", "hard"), [_EMBEDDING]),
        pytest.param(
            "{kind: ray, num_workers: 2, num_actors: 2}",
            COLUMNS,
            [_TRAINING, _EMBEDDING],
            marks=pytest.mark.cluster,
        ),
    ],
    ids=["local", "ray", "ray whole"],
)
def test_killed_and_started_again_ends_as_if_undisturbed(finished, tiny, tmp_path, runtime, columns, moments):
    """And what two workers and two actors on Ray give is what one process gives."""
    output = tmp_path / "run"
    kept: dict[Path, int] = {}
    left: list[psutil.Process] = []
    for pattern, unfinished in moments:
        process = Process(tiny, output, runtime, columns)
        process.kill_when(lambda pattern=pattern: any(output.glob(pattern)))
        assert not is_finished(output / unfinished), f"killed too late for {unfinished}"
        left += process.left
        kept |= {path: path.stat().st_mtime_ns for path in output.glob("*/*/done.json")}
    log = Process(tiny, output, runtime, columns).end()
    require_equal(output, Path(finished[0].output), columns)
    assert len(kept) >= 2
    for path, written in kept.items():
        assert path.stat().st_mtime_ns == written, f"{path} was written again"
    assert log.count("✓ train 1a text retrieval: finished before") == len(moments)
    _, alive = psutil.wait_procs(left, timeout=10)
    for process in alive:
        process.kill()
    assert not alive, "a killed run leaves processes behind"
