"""Each script of `jobs/` is one job of the command line, as its first lines say."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "jobs").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_does_its_job(script, monkeypatch, capsys):
    """With that job's example settings; runs and trainings, whose plans read data, show what they take."""
    config = ROOT / "configs" / "jobs" / f"{script.stem}.yaml"
    looks_at_data = script.stem in ("run", "train")
    arguments = ["--help"] if looks_at_data else [str(config), "--dry-run"]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    monkeypatch.chdir(ROOT)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        assert not ended.code
    said = capsys.readouterr().out
    assert (f"Usage: umarvel {script.stem}" if looks_at_data else "output: ") in said


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_says_how_it_is_handed_in(script):
    text = script.read_text(encoding="utf-8")
    [line] = re.findall(r"^ray job submit --working-dir \. -- python (\S+) (\S+)", text, re.MULTILINE)
    assert line[0] == f"jobs/{script.name}" and (ROOT / line[1]).is_file()


def test_every_job_has_a_script():
    from umarvel_ray.pipeline.jobs import JOBS

    assert {script.stem for script in SCRIPTS} >= {*JOBS, "run"}
