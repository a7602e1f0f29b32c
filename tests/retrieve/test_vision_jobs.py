"""Embedding jobs that keep features of pictures: the second passes no picture through the tower."""

import pickle
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures_embed import candidate_line, embed_config
from pydantic import ValidationError

from umarvel_ray.errors import ConfigError
from umarvel_ray.model.encoder import Encoder
from umarvel_ray.retrieve.embed import (
    EmbeddingWorker,
    Window,
    model_of,
    plan_stores,
    read_window,
    shard_tasks,
)
from umarvel_ray.retrieve.settings import EmbedConfig
from umarvel_ray.retrieve.store import EmbeddingStore
from umarvel_ray.runtime.cluster import RuntimeSettings
from umarvel_ray.runtime.embedding import embed_stores

LOCAL = RuntimeSettings(kind="local")


@pytest.fixture
def pool(pictures: dict[str, str], tmp_path: Path) -> Path:
    """Texts, pictures and both; two rows show the same picture."""
    for name, path in pictures.items():
        shutil.copyfile(path, tmp_path / f"{name}.png")
    lines = [
        candidate_line("9:1", img_path="kite.png"),
        candidate_line("9:2", txt="A boat.", img_path="boat.png"),
        candidate_line("9:3", txt="Over the hill."),
        candidate_line("9:4", txt="The same kite.", img_path="kite.png"),
        candidate_line("9:5", img_path="tower.png"),
    ]
    (tmp_path / "pool.jsonl").write_text("".join(lines))
    return tmp_path / "pool.jsonl"


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pictures of each call of a tower."""
    seen: list[int] = []
    load = Encoder.load.__func__

    def watched(cls: Any, *args: Any, **options: Any) -> Encoder:
        encoder = load(cls, *args, **options)
        encoder.model.model.visual.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(len(kwargs["grid_thw"])), with_kwargs=True
        )
        return encoder

    monkeypatch.setattr(Encoder, "load", classmethod(watched))
    return seen


def embed(config: EmbedConfig) -> np.ndarray:
    plans = plan_stores(config)
    embed_stores(plans, model_of(config), config, LOCAL)
    store = EmbeddingStore.open(plans[0].folder)
    return store.gather(np.arange(len(store)))


def test_a_second_job_looks_at_no_picture(backbone, pool, looks, tmp_path):
    job = partial(embed_config, tmp_path, [pool], checkpoint=backbone)
    plain = embed(job(tmp_path / "plain"))
    looks.clear()
    first = embed(job(tmp_path / "first", vision_store=str(tmp_path / "kept")))
    assert sum(looks) == 3  # the second kite comes after the first was kept
    looks.clear()
    again = embed(job(tmp_path / "again", vision_store=str(tmp_path / "kept")))
    assert looks == []
    for vectors in (first, again):
        np.testing.assert_allclose(vectors, plain, atol=1e-6)


class ReadElsewhere:
    """Reads as a process without weights does: it gets its builder pickled."""

    def __init__(self, make_builder: Any) -> None:
        self.make_builder = make_builder
        self.stored: list[bool] = []

    def look_into(self, vision_store: Path) -> None:
        self.make_builder = partial(self.make_builder, vision_store=vision_store)

    def __call__(self, source: Any, windows: Sequence[np.ndarray]) -> Iterator[Window]:
        builder = pickle.loads(pickle.dumps(self.make_builder()))
        for rows in windows:
            window = read_window(source, rows, builder)
            self.stored += [v.features is not None for item in window.items for v in item.visuals]
            yield window


def test_readers_without_weights_find_what_encoders_kept(backbone, pool, looks, tmp_path):
    found = []
    for name in ("first", "again"):
        config = embed_config(
            tmp_path, [pool], tmp_path / name, checkpoint=backbone, vision_store=str(tmp_path / "kept")
        )
        (plan,), model = plan_stores(config), model_of(config)
        assert model.builder is not None
        read = ReadElsewhere(model.builder)
        worker = EmbeddingWorker(model, read)
        for task in shard_tasks(plan, plan.shards, None):
            worker(task)
        found.append(read.stored)
    # What the first job keeps while it runs, its readers may find or not; the second finds all.
    assert found[1] == [True] * 4 and not any(found[0][:2])
    assert sum(looks) == len(found[0]) - sum(found[0])


def test_who_has_no_such_tower_is_refused(tmp_path):
    values = {"checkpoint": "/m", "output": "/o", "root": "/r", "vision_store": "/v"}
    with pytest.raises(ValidationError, match="vision_store keeps features of our encoder's tower"):
        EmbedConfig.model_validate(values | {"model": {"kind": "towers"}})


def test_object_storage_is_refused(backbone):
    with pytest.raises(ConfigError, match="s3://b/v is object storage"):
        Encoder.load(backbone).keep_vision_features("s3://b/v")
