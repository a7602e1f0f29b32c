"""What a machine keeps of object storage: fetched once, whole, within its limit, never in the way."""

import os
import time
from pathlib import Path

import pytest

from umarvel_ray import cache, storage
from umarvel_ray.cache import cache_folder, kept_bytes, make_room
from umarvel_ray.data.lines import JsonLines
from umarvel_ray.storage import RemotePath, local_file, local_folder, picture_bytes

MIB = 2**20


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """An empty cache of 10 MiB."""
    monkeypatch.setenv("UMARVEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("UMARVEL_CACHE_GIB", str(10 / 1024))
    monkeypatch.setattr(cache, "_added", 0)
    return tmp_path / "cache"


class Store:
    """Counts what is fetched of it."""

    def __init__(self) -> None:
        self.fetched: list[str] = []

    def get(self, name: str, size: int = 100) -> bytes:
        def fetch() -> bytes:
            self.fetched.append(name)
            return name.encode().ljust(size, b".")

        content = kept_bytes(name, fetch)
        assert content == name.encode().ljust(size, b".")
        return content


def held() -> int:
    return sum(path.stat().st_size for path in cache_folder().rglob("*") if path.is_file())


def test_a_content_is_fetched_once(kept):
    store = Store()
    for _ in range(3):
        store.get("s3://b/a.jpg")
        store.get("s3://b/b.jpg")
    assert store.fetched == ["s3://b/a.jpg", "s3://b/b.jpg"]
    assert store.get("s3://b/empty", size=0) == b"s3://b/empty"


@pytest.mark.parametrize("spoil", [b"", b"short", None])
def test_a_copy_that_is_not_whole_is_fetched_again(kept, spoil):
    store = Store()
    store.get("s3://b/a.jpg")
    [path] = [path for path in (kept / "contents").rglob("*") if path.is_file()]
    path.write_bytes(path.read_bytes()[:-1] + b"!" if spoil is None else spoil)
    store.get("s3://b/a.jpg")
    store.get("s3://b/a.jpg")
    assert store.fetched == ["s3://b/a.jpg"] * 2


def test_the_limit_holds_and_what_is_used_stays(kept):
    store = Store()
    now = time.time()
    for number in range(60):
        store.get(f"s3://b/{number}", size=MIB // 2)
        for path in (kept / "contents").rglob("*"):
            if path.is_file() and path.stat().st_mtime > now - 10:
                os.utime(path, (now - 10_000 + number,) * 2)
        store.get("s3://b/0", size=MIB // 2)  # used again and again
    assert held() < 10.5 * MIB
    assert store.fetched.count("s3://b/0") == 1
    store.get("s3://b/59", size=MIB // 2)
    assert store.fetched.count("s3://b/59") == 1
    store.get("s3://b/1", size=MIB // 2)  # long ago
    assert store.fetched.count("s3://b/1") == 2


def test_a_cache_that_cannot_be_written_is_not_in_the_way(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("UMARVEL_CACHE", str(tmp_path / "file" / "cache"))
    store = Store()
    store.get("s3://b/a.jpg")
    store.get("s3://b/a.jpg")
    assert len(store.fetched) == 2
    make_room(1)


def test_without_a_limit_nothing_is_kept(kept, monkeypatch):
    monkeypatch.setenv("UMARVEL_CACHE_GIB", "0")
    store = Store()
    store.get("s3://b/a.jpg")
    store.get("s3://b/a.jpg")
    assert len(store.fetched) == 2 and not kept.exists()


@pytest.fixture
def bucket(kept, monkeypatch):
    """Object storage in this process's memory, which tells the age of a file as others do."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    info = MemoryFileSystem.info

    def with_age(self: MemoryFileSystem, path: str, **options: object) -> dict:
        found = info(self, path, **options)
        return found | ({"mtime": found["created"].timestamp()} if "created" in found else {})

    monkeypatch.setattr(MemoryFileSystem, "info", with_age)
    files = fsspec.filesystem("memory")
    files.store.clear()

    def put(name: str, content: bytes) -> RemotePath:
        files.pipe_file(f"/bucket/{name}", content)
        return RemotePath(f"memory://bucket/{name}")

    storage._filesystem.cache_clear()
    yield put
    files.store.clear()


def test_whole_objects_and_pictures_share_the_limit(bucket, kept, monkeypatch):
    shards = [bucket(f"shard-{number}.arrow", bytes([number]) * 4 * MIB) for number in range(4)]
    picture = bucket("a.jpg", b"picture")
    assert picture_bytes(picture) == b"picture"
    paths = []
    for number, shard in enumerate(shards):
        paths.append(local_file(shard))
        os.utime(paths[-1].parent, (time.time() - 1000 + number,) * 2)
    assert paths[-1].read_bytes() == b"\3" * 4 * MIB
    assert [path.exists() for path in paths] == [False, False, True, True]
    assert held() < 10 * MIB
    assert local_file(shards[0]).read_bytes() == bytes(4 * MIB)  # fetched again
    monkeypatch.setattr(RemotePath, "read_bytes", lambda self: pytest.fail("it was kept"))
    assert picture_bytes(picture) == b"picture"


def test_lines_that_are_opened_again_keep_their_index(bucket, monkeypatch):
    """A copy's age is part of its index's name: using the copy must not make it younger."""
    pool = bucket("pool.jsonl", b'{"did": "9:1"}\n{"did": "9:2"}\n')
    copy = JsonLines(pool)
    (kept_in,) = local_file(pool).parent.glob(".*.index")
    before = sorted(path.name for path in kept_in.iterdir())
    time.sleep(0.01)
    monkeypatch.setattr("umarvel_ray.data.lines._scan", lambda file: pytest.fail("indexed again"))
    assert JsonLines(pool)[1] == copy[1] == {"did": "9:2"}
    assert sorted(path.name for path in kept_in.iterdir()) == before


def test_what_another_process_is_fetching_stays(bucket, kept):
    in_work = kept / "objects" / "another" / "x.tmp"
    in_work.parent.mkdir(parents=True)
    in_work.write_bytes(bytes(9 * MIB))
    local_file(bucket("shard.arrow", bytes(4 * MIB)))
    assert in_work.exists()
    os.utime(in_work, (time.time() - 10 * 3600,) * 2)  # nobody will finish it
    local_file(bucket("shard-2.arrow", bytes(4 * MIB)))
    assert not in_work.exists()


def test_a_folder_is_fetched_whole_and_anew_when_it_changed(bucket, kept):
    for name in ("config.json", "deep/model.safetensors"):
        bucket(f"checkpoint/{name}", name.encode())
    folder = local_folder("memory://bucket/checkpoint")
    assert (folder / "deep" / "model.safetensors").read_bytes() == b"deep/model.safetensors"
    bucket("checkpoint/config.json", b"another")
    assert (local_folder("memory://bucket/checkpoint") / "config.json").read_bytes() == b"another"


def test_a_picture_on_a_disk_is_read_where_it_is(kept, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"picture")
    assert picture_bytes(str(tmp_path / "a.jpg")) == b"picture"
    assert not kept.exists()
