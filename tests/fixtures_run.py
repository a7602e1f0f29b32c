"""A run so small that the whole recipe takes seconds: world, backbone and settings, made once a session."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from umarvel_ray.demo.backbone import make_backbone
from umarvel_ray.demo.prepare import demo_places
from umarvel_ray.demo.world import WorldConfig, make_world, world_texts
from umarvel_ray.pipeline.run import load_run
from umarvel_ray.pipeline.settings import RunConfig
from umarvel_ray.pipeline.view import View

WORLD = WorldConfig(
    seed=0,
    pixels=56,
    min_things=2,
    max_things=3,
    train_queries=8,
    val_queries=2,
    test_queries=3,
    near_misses=2,
    sentence_pairs=40,
    captioned_scenes=20,
)
TASKS = ("mscoco_task0", "webqa_task1", "nights_task4", "oven_task6", "cirr_task7", "infoseek_task8")
"""Evaluated and mined; training reads all that the world has."""
CONTROLS = ("in_batch", "unfiltered", "own_negatives", "continue_hard")

_FULL = {
    "trainable": "full",
    "batch_size": 8,
    "num_steps": 4,
    "learning_rate": 2e-3,
    "max_tokens": 1024,
    "save_every": 2,
}
_LORA = _FULL | {
    "trainable": "lora",
    "lora": {"rank": 4, "alpha": 8},
    "learn_temperature": True,
    "num_steps": 3,
}
SETTINGS: dict[str, Any] = {
    "title": "tiny run",
    "seed": 0,
    "data": {"tasks": list(TASKS)},
    "stages": {
        "text": {"train": _FULL},
        "align": {"train": _FULL, "loss": {"candidate_to_query": 1.0}},
        "instruct": {"train": _FULL | {"learn_temperature": True, "num_steps": 8}},
        "hard": {
            "train": _LORA,
            "num_negatives": 2,
            "mining": {"rule": "skip_top", "value": 2, "num_negatives": 3, "depth": 10},
        },
        "reranker": {
            "start": "instruct",
            "train": _FULL | {"num_steps": 3},
            "mining": {"rule": "none", "num_negatives": 8, "depth": 10},
            "depth": 10,
        },
        "distil": {"train": _LORA, "loss": {"kind": "distillation"}, "share": 0.25, "depth": 4},
    },
    "retrieval": {
        "rows_per_shard": 64,
        "dtype": "float32",
        "depth": 10,
        "queries_per_shard": 32,
        "query_block_rows": 4,
    },
    "runtime": {"kind": "local", "num_workers": 2, "num_actors": 2},
}


@dataclass(frozen=True)
class TinyRun:
    """World, backbone and a settings file that names them.

    Attributes:
        home: The folder of all three.
        config: The settings file.
    """

    home: Path
    config: Path

    @property
    def root(self) -> Path:
        """M-BEIR's."""
        return self.home / "world" / "M-BEIR"

    def settings(self, output: Path, *overrides: str) -> RunConfig:
        """The run, with its own output folder."""
        return load_run(self.config, [f"output={output}", *overrides])

    def copy(self, folder: Path) -> "TinyRun":
        """World and settings anew, to be spoiled; the backbone is shared."""
        folder.mkdir(parents=True, exist_ok=True)
        # Pictures and files are shared until `rewrite` replaces one.
        shutil.copytree(self.home / "world", folder / "world", copy_function=os.link)
        (folder / "backbone").symlink_to(self.home / "backbone")
        return TinyRun(folder, _write_settings(folder))


def rewrite(path: Path, content: str | bytes) -> None:
    """Put another file in the place of one that a copy of the world shares with the original."""
    path.unlink()
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _write_settings(home: Path) -> Path:
    values = json.loads(json.dumps(SETTINGS))  # by value: YAML would write shared groups as references
    for place in demo_places(home):
        key, _, path = place.partition("=")
        group, _, name = key.rpartition(".")
        (values.setdefault(group, {}) if group else values)[name] = path
    config = home / "run.yaml"
    config.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return config


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The run, nothing of it done."""
    from fixtures_model import CONFIG

    home = tmp_path_factory.mktemp("tiny")
    make_world(WORLD, home / "world")
    make_backbone(world_texts(home / "world"), home / "backbone", CONFIG)
    return TinyRun(home, _write_settings(home))


class Lines(View):
    """A view that keeps its lines."""

    def __init__(self) -> None:
        import io

        self.text = io.StringIO()
        super().__init__(Console(file=self.text, width=200, highlight=False))

    @property
    def lines(self) -> Sequence[str]:
        """What was written."""
        return self.text.getvalue().splitlines()
