"""A place in object storage does what a path does; files appear whole; what is fetched is fetched once."""

import pickle
from pathlib import Path, PurePosixPath

import pytest

from umarvel_ray import cache
from umarvel_ray.artifacts import (
    atomic_folder,
    atomic_write,
    claim_folder,
    data_fingerprint,
    file_fingerprint,
    finish_folder,
    is_finished,
    read_json,
    write_json,
)
from umarvel_ray.data.lines import JsonLines
from umarvel_ray.errors import OutputError, StorageError
from umarvel_ray.storage import RemotePath, at, join, local_file, local_folder, read_bytes


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """An empty bucket in this process's memory, and a cache of its own."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    info = MemoryFileSystem.info

    def with_age(self: MemoryFileSystem, path: str, **options: object) -> dict:
        found = info(self, path, **options)
        return found | ({"mtime": found["created"].timestamp()} if "created" in found else {})

    monkeypatch.setattr(MemoryFileSystem, "info", with_age)
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield at("memory://bucket")
    filesystem.store.clear()


def test_a_local_path_is_a_path(tmp_path):
    assert at(tmp_path / "x") == tmp_path / "x" == at(f"file://{tmp_path}/x")
    assert isinstance(at("here"), Path) and at("here").is_absolute()
    assert join("/root", "a/b.png") == "/root/a/b.png" and join("/root", "/a.png") == "/a.png"
    assert join("s3://b/root/", "a/b.png") == "s3://b/root/a/b.png" and join("/r", "s3://b/a") == "s3://b/a"


def test_names_are_those_of_pathlib():
    """The independent answer is PurePosixPath over the key."""
    path = at("s3://bucket/a/../b/shard-00001.arrow/")
    key = PurePosixPath("bucket/b/shard-00001.arrow")
    assert str(path) == f"s3://{key}"
    assert (path.name, path.stem, path.suffix) == (key.name, key.stem, key.suffix)
    assert [str(above) for above in path.parents] == ["s3://bucket/b", "s3://bucket"]
    assert path.parent / "shard-00001.arrow" == path == pickle.loads(pickle.dumps(path))
    assert str(path.relative_to("s3://bucket")) == "b/shard-00001.arrow"
    with pytest.raises(ValueError):
        path.relative_to("s3://other")


def test_files_appear_whole_or_not_at_all(bucket):
    place = bucket / "run" / "a.txt"
    with pytest.raises(KeyboardInterrupt), atomic_write(place) as file:
        file.write("half")
        raise KeyboardInterrupt
    assert not place.exists() and not (bucket / "run").exists()
    with atomic_write(place) as file:
        file.write("Ærø\nskøbing\n")
        assert not place.exists()
    assert (place.is_file(), place.is_dir(), place.parent.is_dir()) == (True, False, True)
    assert place.read_text() == "Ærø\nskøbing\n" and place.stat().st_size == len(place.read_bytes())
    with place.open() as file:
        assert file.readlines() == ["Ærø\n", "skøbing\n"]
    with place.open("rb") as file:
        file.seek(3)
        assert file.read(2) == place.read_bytes()[3:5]
    assert read_bytes(str(place)) == place.read_bytes()
    with pytest.raises(StorageError, match="no mode 'a'"):
        place.open("a")
    place.unlink()
    place.unlink(missing_ok=True)
    for missing in (place.read_bytes, place.stat, place.unlink):
        with pytest.raises(FileNotFoundError):
            missing()


def test_a_folder_has_what_lies_under_it(bucket):
    with atomic_folder(bucket / "step") as folder:
        (folder / "state.json").write_text("{}")
        (folder / "deep").mkdir()
        (folder / "deep" / "weights").write_bytes(b"12345")
    assert sorted((bucket / "step").files()) == ["deep/weights", "state.json"]
    assert [path.name for path in (bucket / "step").iterdir()] == ["deep", "state.json"]
    assert [path.name for path in (bucket / "step").glob("*.json")] == ["state.json"]
    assert [path.name for path in (bucket / "step").rglob("we*")] == ["weights"]
    assert list((bucket / "nowhere").iterdir()) == []
    with atomic_folder(bucket / "step") as folder:
        (folder / "other").touch()
    assert list((bucket / "step").files()) == ["other"]


def test_a_job_owns_its_folder(bucket):
    folder = bucket / "job"
    claim_folder(folder, {"seed": 1})
    claim_folder(folder, {"seed": 1})
    with pytest.raises(OutputError, match="first: seed was 1, is 2"):
        claim_folder(folder, {"seed": 2})
    assert not is_finished(folder)
    finish_folder(folder, {"rows": 3})
    assert is_finished(str(folder)) and read_json(folder / "done.json") == {"rows": 3}
    write_json(bucket / "strange" / "x.json", {})
    with pytest.raises(OutputError, match=r"not ours \(first: x\.json"):
        claim_folder(bucket / "strange", {"seed": 1})


def test_what_is_fetched_is_fetched_once_until_it_changes(bucket, monkeypatch):
    place = bucket / "pool.jsonl"
    with atomic_write(place) as file:
        file.write('{"did": "1"}\n')
    fetched: list[str] = []
    download = RemotePath.download

    def counted(self: RemotePath, target: object) -> None:
        fetched.append(str(self))
        download(self, target)

    monkeypatch.setattr(RemotePath, "download", counted)
    lines = JsonLines(place)
    assert lines[0] == {"did": "1"} and lines.where(0) == "memory://bucket/pool.jsonl:1"
    assert data_fingerprint(place) == file_fingerprint(place) == lines.fingerprint
    assert local_file(place) == local_file(place) and fetched == [str(place)]
    with atomic_write(place) as file:
        file.write('{"did": "2"}\n')
    assert JsonLines(place)[0] == {"did": "2"} and len(fetched) == 2
    assert data_fingerprint(place) != lines.fingerprint


def test_the_cache_drops_what_was_not_used_longest(bucket, monkeypatch, tmp_path):
    monkeypatch.setenv(cache.CACHE_GIB_VARIABLE, str(250 / 2**30))
    with atomic_folder(bucket / "model") as folder:
        (folder / "weights").write_bytes(b"w" * 100)
    for name in ("a", "b"):
        with atomic_write(bucket / name, "wb") as file:
            file.write(name.encode() * 100)
    first = local_file(bucket / "a")
    model = local_folder(bucket / "model")
    assert (model / "weights").read_bytes() == b"w" * 100
    import os

    os.utime(model.parent, (1, 1))
    second = local_file(bucket / "b")
    assert first.exists() and second.exists() and not model.exists()
    assert (local_folder(bucket / "model") / "weights").read_bytes() == b"w" * 100


def test_a_store_that_does_not_answer_is_named_in_one_line(monkeypatch):
    with pytest.raises(StorageError, match="nosuch://: this storage cannot be used") as refused:
        at("nosuch://bucket/x").exists()
    assert "\n" not in str(refused.value)


def test_a_data_file_is_named_by_its_content(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    import os

    first, copy = tmp_path / "a", tmp_path / "b"
    first.write_text("content")
    copy.write_text("content")
    os.utime(copy, (1, 1))
    assert data_fingerprint(first) == data_fingerprint(copy) == file_fingerprint(first)
    first.write_text("CONTENT")
    assert data_fingerprint(first) != data_fingerprint(copy)
