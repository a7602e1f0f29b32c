"""A run is handed in once and only once, whoever asks how often; its exit code comes back."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from fixtures_run import Lines, TinyRun

from umarvel_ray.errors import ConfigError, OutputError
from umarvel_ray.pipeline.run import load_run
from umarvel_ray.pipeline.submit import submission_name, submit


class StubServer:
    """Keeps jobs in a dict; one ends as soon as it is followed."""

    def __init__(self, *, ends_with: int = 0) -> None:
        self.jobs: dict[str, str] = {}
        self.packed: dict[str, Any] = {}
        self.entrypoint = ""
        self.ends_with = ends_with

    def states(self, prefix: str) -> dict[str, str]:
        return {name: status for name, status in self.jobs.items() if name.startswith(prefix)}

    def submit(self, name: str, entrypoint: str, *, folder: Path, env: Any, metadata: Any) -> bool:
        if name in self.jobs:
            return False
        self.jobs[name], self.entrypoint = "RUNNING", entrypoint
        # What the cluster would do with the copy: the packed program must read the packed settings.
        self.packed = yaml.safe_load((folder / "submitted.yaml").read_text())
        done = subprocess.run(
            [sys.executable, "-c", "import umarvel_ray, os; print(os.path.dirname(umarvel_ray.__file__))"],
            cwd=folder,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == str(folder / "umarvel_ray")
        return True

    def follow(self, name: str, write: Any) -> None:
        self.jobs[name] = "FAILED" if self.ends_with else "SUCCEEDED"

    def status(self, name: str) -> str:
        return self.jobs[name]

    def exit_code(self, name: str) -> int:
        return self.ends_with

    def message(self, name: str) -> str:
        return "it said so"


def hand_in(server: StubServer, tiny: TinyRun, *overrides: str, **how: Any) -> tuple[int, list[str]]:
    run = load_run(tiny.config, [f"output={tiny.home / 'out'}", "runtime.kind=ray", *overrides])
    lines = Lines()
    code = submit(
        "run", run, run.runtime, lines, address="http://here", connect=lambda address: server, **how
    )  # type: ignore[arg-type]
    return code, list(lines.lines)


def test_settings_travel_resolved(tiny):
    server = StubServer()
    assert hand_in(server, tiny, "stages.text.train.num_steps=7")[0] == 0
    assert server.packed["stages"]["text"]["train"]["num_steps"] == 7
    assert server.packed["data"]["root"] == str(tiny.root)  # absolute: a copy elsewhere means the same
    assert server.entrypoint == "python -m umarvel_ray.cli run submitted.yaml"


def test_the_same_run_twice_is_one_job(tiny):
    server = StubServer()
    code, first = hand_in(server, tiny, detach=True)
    assert code == 0 and len(server.jobs) == 1
    [name] = server.jobs
    assert any(name in line for line in first)
    _, again = hand_in(server, tiny, "title=another word", "runtime.num_actors=3", detach=True)
    assert len(server.jobs) == 1 and again[0] == f"on already, following: {name}"
    with pytest.raises(OutputError, match=rf"this run is on already, as {name} \(running\)"):
        hand_in(server, tiny, attach=False)
    hand_in(server, tiny, "seed=1", detach=True)  # other results: another run
    assert len(server.jobs) == 2


def test_a_run_that_ended_may_be_handed_in_again(tiny):
    server = StubServer(ends_with=3)
    code, lines = hand_in(server, tiny)
    assert code == 3 and lines[-1].endswith("failed with 3: it said so")
    server.ends_with = 0
    assert hand_in(server, tiny)[0] == 0
    first, second = server.jobs
    assert second == f"{first}-2"


def test_two_that_hand_in_at_once_follow_one_job(tiny):
    server = StubServer()

    class Late(StubServer):
        """Was asked before the other handed in."""

        def __init__(self) -> None:
            super().__init__()
            self.jobs = server.jobs

        def states(self, prefix: str) -> dict[str, str]:
            return {}

    hand_in(server, tiny, detach=True)
    code, lines = hand_in(Late(), tiny)
    assert code == 0 and len(server.jobs) == 1
    assert lines[0].startswith("handed in by someone else: ")


def test_one_process_is_no_cluster(tiny):
    with pytest.raises(ConfigError, match=r"runtime\.kind is 'local'"):
        hand_in(StubServer(), tiny, "runtime.kind=local")


def test_a_name_says_the_job_and_nothing_of_the_machine(tiny):
    run = tiny.settings(tiny.home / "out")
    name = submission_name("run", run)
    assert name.startswith("umarvel-run-") and len(name) == len("umarvel-run-") + 16
    assert name != submission_name("run", tiny.settings(tiny.home / "other"))
