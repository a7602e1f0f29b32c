"""Random access to JSONL agrees with reading it from the start, in little memory, wherever its index lies."""

import hashlib
import io
import json
import pickle
import tracemalloc

import pytest

from umarvel_ray.data import lines as lines_module
from umarvel_ray.data.lines import Faults, JsonLines
from umarvel_ray.errors import DataError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path, text):
    path.write_bytes(text.encode("utf-8"))
    return path


AWKWARD = '{"did": "a:1", "txt": "x\u2028y"}\n\n \t\r\n{"did": "a:2"}\r\n  {"did": "a:3"}\n\n{"did": "a:4"}'


def test_rows_are_the_lines_that_are_not_blank(tmp_path):
    """The independent answer splits at newlines only, which a line separator inside a text is not."""
    path = write(tmp_path / "pool.jsonl", AWKWARD)
    expected = [(n, json.loads(t)) for n, t in enumerate(AWKWARD.split("\n"), start=1) if t.strip()]
    lines = JsonLines(path)
    assert [(lines.line(row), lines[row]) for row in range(len(lines))] == expected
    assert list(lines) == [value for _, value in expected]
    assert lines[-1] == expected[-1][1]
    assert (len(lines), lines.num_blank) == (4, 3)
    assert lines.fingerprint == hashlib.sha256(AWKWARD.encode()).hexdigest()[:16]
    with pytest.raises(IndexError):
        lines[4]


@pytest.mark.parametrize("block_bytes", [1, 7, 64])
def test_the_size_of_a_block_does_not_matter(tmp_path, monkeypatch, block_bytes):
    whole = lines_module._scan(io.BytesIO(AWKWARD.encode()))
    monkeypatch.setattr(lines_module, "_BLOCK_BYTES", block_bytes)
    pieces = lines_module._scan(io.BytesIO(AWKWARD.encode()))
    assert [part if isinstance(part, str) else part.tolist() for part in pieces] == [
        part if isinstance(part, str) else part.tolist() for part in whole
    ]


@pytest.mark.parametrize(("text", "rows"), [("", 0), ("\n\n", 0), ("{}", 1), ("{}\n", 1), ("\n{}", 1)])
def test_short_files(tmp_path, text, rows):
    lines = JsonLines(write(tmp_path / "pool.jsonl", text))
    assert len(lines) == len(list(lines)) == rows
    assert JsonLines(lines.path).keys("did", unique=True).find("a:1") is None if not rows else True


@pytest.mark.parametrize("bad", ["{nope", "[1]", "\udcff", "[" * 100_000])
def test_a_broken_line_is_named(tmp_path, bad):
    path = tmp_path / "pool.jsonl"
    path.write_bytes(b'{"did": "a:1"}\n\n' + bad.encode("utf-8", "surrogateescape") + b"\n")
    lines = JsonLines(path)
    assert lines[0] == {"did": "a:1"}
    with pytest.raises(DataError, match=r"pool.jsonl:3: ") as error:
        lines[1]
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.jsonl: cannot be read"):
        JsonLines(tmp_path / "nowhere.jsonl")


def test_every_key_is_found_and_no_other(tmp_path):
    text = "".join(json.dumps({"did": f"9:{n}"}) + "\n" for n in range(500, 0, -1))
    index = JsonLines(write(tmp_path / "pool.jsonl", text)).keys("did", unique=True)
    assert [index.find(f"9:{n}") for n in range(500, 0, -1)] == list(range(500))
    assert index.find("9:501") is None
    assert "9:7" in index and "9:07" not in index


def test_keys_that_share_a_hash_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(lines_module, "_digest", lambda key: bytes([len(key)]) * 8)
    text = "".join(json.dumps({"did": did}) + "\n" for did in ["a:1", "a:2", "b:33", "a:1", "b:44"])
    lines = JsonLines(write(tmp_path / "pool.jsonl", text))
    index = lines.keys("did", unique=False)
    assert [index.find(did) for did in ("a:1", "a:2", "b:33", "b:44", "c:1")] == [0, 1, 2, 4, None]
    assert index.find_all("a:1") == [0, 3]
    assert (index.num_repeats, index.first_repeat) == (1, ("a:1", 0, 3))


def test_repeated_keys_are_refused_only_where_they_must_not_be(tmp_path):
    names = ["a:1", "a:2", "", "a:2", "a:1", "a:2"]
    text = "".join(f"{json.dumps({'qid': name}) if name else ''}\n" for name in names)
    lines = JsonLines(write(tmp_path / "train.jsonl", text))
    assert lines.keys("qid", unique=False).find_all("a:2") == [1, 2, 4]
    with pytest.raises(DataError, match=r"train.jsonl:4: qid 'a:2' stands in line 2 already \(3 of 5 lines"):
        lines.keys("qid", unique=True)


@pytest.mark.parametrize("line", ["{}", '{"did": 7}', '{"did": ""}'])
def test_a_row_without_key_is_named(tmp_path, line):
    with pytest.raises(DataError, match=r"pool.jsonl:2: 'did' is"):
        JsonLines(write(tmp_path / "pool.jsonl", f'{{"did": "a:1"}}\n{line}\n')).keys("did", unique=True)


def test_the_index_is_built_once_and_anew_when_the_file_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "pool.jsonl", '{"did": "a:1"}\n{"did": "a:2"}\n')
    first = JsonLines(path)
    first.keys("did", unique=True)
    with monkeypatch.context() as patch:
        patch.setattr(lines_module, "_scan", None)
        patch.setattr(JsonLines, "_hash_keys", None)
        assert JsonLines(path).keys("did", unique=True).find("a:2") == 1
        assert pickle.loads(pickle.dumps(first))[1] == {"did": "a:2"}
    write(path, '{"did": "a:3"}\n')
    again = JsonLines(path)
    assert list(again) == [{"did": "a:3"}]
    assert again.keys("did", unique=True).find("a:2") is None
    stamps = {item.name.split(".")[0] for item in (tmp_path / ".pool.jsonl.index").iterdir()}
    assert len(stamps) == 1


def test_the_index_goes_to_the_cache_where_the_folder_cannot_be_written(tmp_path):
    path = write(tmp_path / "pool.jsonl", '{"did": "a:1"}\n')
    write(tmp_path / ".pool.jsonl.index", "a file stands where the folder would")
    assert JsonLines(path).keys("did", unique=True).find("a:1") == 0
    assert list((tmp_path / "cache").rglob("*.starts.npy"))
    write(tmp_path / "other.jsonl", "{}")
    write(tmp_path / ".other.jsonl.index", "")
    (tmp_path / "cache").rename(tmp_path / "gone")
    write(tmp_path / "cache", "")
    with pytest.raises(DataError, match="set XDG_CACHE_HOME"):
        JsonLines(tmp_path / "other.jsonl")


def test_opening_a_long_file_takes_far_less_memory_than_the_file(tmp_path):
    path = tmp_path / "pool.jsonl"
    with open(path, "w") as file:
        file.writelines(f'{{"did": "9:{n}", "txt": "{"word " * 60}"}}\n' for n in range(50_000))
    for _ in ("first, the index is built", "then it is opened"):
        tracemalloc.start()
        lines = JsonLines(path)
        assert lines[49_999]["did"] == "9:49999"
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 4
        tracemalloc.stop()
    tracemalloc.start()
    assert JsonLines(path)[25_000]["did"] == "9:25000"
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_faults_are_counted_by_file_and_rule():
    faults = Faults()
    for line in (3, 5):
        faults.add("a.jsonl", line, "a did repeats", detail=f"case {line}", advice="Keep one.")
    faults.add("a.jsonl", None, "missing", detail="no such file", advice="Copy it.")
    assert faults.report() == [
        "a.jsonl:3: a did repeats: case 3 (2 such in this file, this is the first). Keep one.",
        "a.jsonl: missing: no such file. Copy it.",
    ]
