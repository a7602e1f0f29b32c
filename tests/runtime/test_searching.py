"""Search over stores: the same run in one process or many, whole or resumed, as one matrix product gives."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from umarvel_ray.data.trec import Run
from umarvel_ray.errors import UmarvelError
from umarvel_ray.retrieve.store import EmbeddingPool, EmbeddingStore, finish_store, plan_shards, write_shard
from umarvel_ray.runtime import searching
from umarvel_ray.runtime.cluster import RuntimeSettings
from umarvel_ray.runtime.searching import SearchTask, search

LOCAL = RuntimeSettings(kind="local")


def make_store(folder: Path, num: int, seed: int, dim: int = 16) -> Path:
    vectors = np.random.default_rng(seed).standard_normal((num, dim)).astype(np.float32)
    # Every third vector stands twice: ties must come out the same everywhere.
    vectors[2::3] = vectors[1 : len(vectors) - 1 : 3]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    plan = plan_shards(num, 10)
    for shard in plan:
        ids = [f"{folder.name}:{row}" for row in range(shard.start, shard.stop)]
        write_shard(folder, shard, ids, vectors[shard.start : shard.stop], dtype="float16", fingerprint="f")
    finish_store(folder, plan, fingerprint="f", settings={})
    return folder


@pytest.fixture
def stores(tmp_path):
    return {
        name: make_store(tmp_path / name, num, seed)
        for seed, (name, num) in enumerate({"queries": 23, "pool1": 31, "pool2": 12}.items())
    }


def tasks_in(folder: Path, stores: dict[str, Path], k: int = 8) -> list[SearchTask]:
    return [
        SearchTask(stores["queries"], (stores["pool1"],), k, folder / "local.arrow"),
        SearchTask(stores["queries"], (stores["pool1"], stores["pool2"]), k, folder / "global.arrow"),
    ]


def expected(task: SearchTask) -> dict[str, list[tuple[str, float]]]:
    """A float64 matrix product over the stored vectors, ties by row."""
    queries, pool = EmbeddingStore.open(task.queries), EmbeddingPool(task.pools)
    left, right = queries.vectors(0, len(queries)), pool.vectors(0, len(pool))
    scores = (left.astype(np.float64) @ right.astype(np.float64).T).astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")[:, : task.k]
    dids = pool.ids.to_pylist()
    return {
        qid: [(dids[row], float(scores[place, row])) for row in order[place]]
        for place, qid in enumerate(queries.ids.to_pylist())
    }


@pytest.mark.parametrize("k", [1, 8, 100])
def test_a_run_is_one_matrix_product(tmp_path, stores, k):
    tasks = tasks_in(tmp_path / "out", stores, k)
    search(tasks, LOCAL, query_block_rows=10)
    for task in tasks:
        assert Run.read(task.output).as_dict() == expected(task)


def test_query_blocks_do_not_move_a_bit_and_leave_nothing_behind(tmp_path, stores):
    written = []
    for rows in (1, 7, 23, 1000):
        folder = tmp_path / str(rows)
        search(tasks_in(folder, stores), LOCAL, query_block_rows=rows)
        assert sorted(path.name for path in folder.iterdir()) == ["global.arrow", "local.arrow"]
        written.append([Run.read(task.output).as_dict() for task in tasks_in(folder, stores)])
    assert all(runs == written[0] for runs in written)


class Stopped(Exception):
    """Stands for a kill."""


def test_a_stopped_search_goes_on_where_it_was(tmp_path, stores):
    tasks = tasks_in(tmp_path / "out", stores)
    seen = []

    def stop_at_four(done, total):
        seen.append((done, total))
        if done == 4:
            raise Stopped

    with pytest.raises(Stopped):
        search(tasks, LOCAL, query_block_rows=5, progress=stop_at_four)
    assert seen[0] == (0, 10) and not any(task.output.exists() for task in tasks)
    seen.clear()
    search(tasks, LOCAL, query_block_rows=5, progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (4, 10) and seen[-1] == (10, 10) and len(seen) == 7
    for task in tasks:
        assert Run.read(task.output).as_dict() == expected(task)


def test_blocks_of_another_search_are_not_taken_for_ours(tmp_path, stores):
    def stop(done, total):
        if done:
            raise Stopped

    output = tmp_path / "out" / "run.arrow"
    for k, pools in ((3, (stores["pool1"],)), (8, (stores["pool2"],))):
        with pytest.raises(Stopped):
            search(
                [SearchTask(stores["queries"], pools, k, output)], LOCAL, query_block_rows=5, progress=stop
            )
    task = SearchTask(stores["queries"], (stores["pool1"],), 8, output)
    search([task], LOCAL, query_block_rows=5)
    assert Run.read(output).as_dict() == expected(task)


@pytest.mark.parametrize(("num_actors", "rows"), [(1, 1000), (3, 10), (7, 1000), (64, 1000), (64, 1)])
def test_a_cut_covers_every_pair_once(tmp_path, stores, monkeypatch, num_actors, rows):
    """More actors than blocks of queries share the pool; the result does not show it."""
    monkeypatch.setattr(searching, "_MIN_SLICE_ROWS", 8)
    task = tasks_in(tmp_path / "out", stores)[1]
    runtime = RuntimeSettings(kind="local", num_actors=num_actors)
    cells = searching._plan(task, runtime, rows)
    pairs = [(q, c) for x in cells for q in range(x.start, x.stop) for c in range(x.first, x.last)]
    assert len(pairs) == len(set(pairs)) == 23 * 43
    assert max(cell.stop - cell.start for cell in cells) <= rows
    assert len({cell.first for cell in cells}) == {1: 1, 3: 1, 7: 5}.get(num_actors, 5 if rows > 1 else 2)
    search([task], runtime, query_block_rows=rows)
    assert Run.read(task.output).as_dict() == expected(task)


def test_another_number_of_actors_goes_on_with_what_is_there(tmp_path, stores):
    def stop_at_two(done, total):
        if done == 2:
            raise Stopped

    task = tasks_in(tmp_path / "out", stores)[0]
    with pytest.raises(Stopped):
        search([task], RuntimeSettings(kind="local", num_actors=3), query_block_rows=6, progress=stop_at_two)
    seen = []
    search([task], LOCAL, query_block_rows=20, progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (2, 4) and Run.read(task.output).as_dict() == expected(task)


def test_faiss_gives_the_same_run(tmp_path, stores):
    pytest.importorskip("faiss")
    task = tasks_in(tmp_path / "out", stores)[1]
    search([task], LOCAL, backend="faiss")
    assert Run.read(task.output).as_dict() == expected(task)


@pytest.mark.parametrize("block_bytes", [64, 640, 1 << 20])
def test_blocks_of_candidates_do_not_move_a_bit(tmp_path, stores, monkeypatch, block_bytes):
    monkeypatch.setattr(searching, "_CANDIDATE_BYTES", block_bytes)
    task = tasks_in(tmp_path / "out", stores)[1]
    search([task], LOCAL)
    assert Run.read(task.output).as_dict() == expected(task)


def raw_store(folder: Path, vectors: np.ndarray) -> Path:
    plan = plan_shards(len(vectors), 10)
    ids = [f"{folder.name}:{row}" for row in range(len(vectors))]
    write_shard(folder, plan[0], ids, vectors, dtype="float32", fingerprint="f")
    finish_store(folder, plan, fingerprint="f", settings={})
    return folder


def test_vectors_not_of_unit_length_are_refused_by_name(tmp_path, stores):
    vectors = np.eye(5, 16, dtype=np.float32)
    vectors[3] *= 1.5
    odd = raw_store(tmp_path / "odd", vectors)
    output = tmp_path / "run.arrow"
    with pytest.raises(
        UmarvelError, match=r"1 of 36 vectors are not of unit length \(first: odd:3 has length 1.5"
    ):
        search([SearchTask(stores["queries"], (stores["pool1"], odd), 3, output)], LOCAL)
    with pytest.raises(UmarvelError, match=r"first: odd:3 has length 1.5"):
        search([SearchTask(odd, (stores["pool1"],), 3, output)], LOCAL)
    vectors[3] = np.nan
    with pytest.raises(UmarvelError, match=r"not of unit length \(first: nan:3 is not finite"):
        searching._require_unit(vectors, "here", lambda rows: [f"nan:{row}" for row in rows])


def test_what_it_takes_is_told_before_it_starts(tmp_path, stores, monkeypatch):
    told, order = [], []
    monkeypatch.setattr(searching, "run_actors", lambda *_: order.append("work") or iter(()))
    task = tasks_in(tmp_path / "out", stores)[1]
    with pytest.raises(UmarvelError):  # nothing was searched, so the parts are missing
        search([task], LOCAL, announce=lambda estimate: told.append(estimate) or order.append("told"))
    assert order == ["told", "work"]
    assert told[0].flop == 2 * 23 * 43 * 16 and told[0].num_cells == 1
    assert told[0].seconds(1e3, num_actors=4) == told[0].flop / 1e3
    assert told[0].measured_rate(1) > 1e6
    monkeypatch.setattr(searching, "_PROCESS_BYTES", 1 << 50)
    with pytest.raises(UmarvelError, match="Lower query_block_rows"):
        search([task], LOCAL)


def test_stores_of_other_widths_are_refused(tmp_path, stores):
    narrow = make_store(tmp_path / "narrow", 6, seed=9, dim=8)
    with pytest.raises(UmarvelError, match="width"):
        search([SearchTask(stores["queries"], (narrow,), 3, tmp_path / "run.arrow")], LOCAL)
    with pytest.raises(UmarvelError, match="width"):
        both = (stores["pool1"], narrow)
        search([SearchTask(stores["queries"], both, 3, tmp_path / "run.arrow")], LOCAL)


@pytest.mark.slow
def test_actors_agree_with_one_process_though_one_dies(tmp_path, stores, ray_session, monkeypatch):
    died = tmp_path / "died"
    worker = searching.SearchWorker

    class Mortal(worker):
        """Its process ends, without a word, at the first block that any of them is given."""

        def __call__(self, block):
            if not died.exists():
                died.touch()
                os._exit(1)
            return super().__call__(block)

    monkeypatch.setattr(searching, "SearchWorker", Mortal)
    tasks = tasks_in(tmp_path / "out", stores)
    search(tasks, RuntimeSettings(kind="ray", num_actors=2), query_block_rows=5)
    assert died.exists()
    for task in tasks:
        assert Run.read(task.output).as_dict() == expected(task)


KILLED = """
import sys
from pathlib import Path
from umarvel_ray.runtime import searching
from umarvel_ray.runtime.cluster import RuntimeSettings, connect
from umarvel_ray.runtime.searching import SearchTask, search

runtime = RuntimeSettings(kind=sys.argv[2], num_actors=2)
connect(runtime)
home = Path(sys.argv[1])
task = SearchTask(home / "queries", (home / "pool1", home / "pool2"), 8, home / "killed" / "run.arrow")
search([task], runtime, query_block_rows=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "ray"])
def test_a_driver_that_is_killed_starts_again_where_it_was(tmp_path, stores, kind):
    undisturbed = tasks_in(tmp_path / "out", stores)[1]
    search([undisturbed], LOCAL)
    command = [sys.executable, "-c", KILLED, str(tmp_path), kind]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while not (parts := list(tmp_path.glob("killed/.run.*.parts/queries-*.arrow"))):
            assert process.poll() is None and time.monotonic() < deadline, "nothing to kill"
            time.sleep(0.001)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    output = tmp_path / "killed" / "run.arrow"
    assert not output.exists()
    before = {part: part.stat().st_mtime_ns for part in parts}
    seen = []

    def look(done, total):
        seen.append({part: part.stat().st_mtime_ns for part in before})

    task = SearchTask(undisturbed.queries, undisturbed.pools, 8, output)
    done = search([task], LOCAL, query_block_rows=2, progress=look)
    assert done.num_found >= len(before) and all(times == before for times in seen)
    assert output.read_bytes() == undisturbed.output.read_bytes()
    assert not list(output.parent.glob(".*.parts"))


@pytest.mark.slow
def test_an_actor_that_is_killed_is_replaced(tmp_path, stores, ray_session, monkeypatch):
    """SIGKILL from outside, in the middle of its work."""
    pids = tmp_path / "pids"
    pids.mkdir()
    worker = searching.SearchWorker

    class Watched(worker):
        """Says which process it is, and takes its time."""

        def __call__(self, cell):
            (pids / str(os.getpid())).touch()
            time.sleep(0.2)
            return super().__call__(cell)

    def kill_one(done, total):
        if done == 2 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(int(next(pids.iterdir()).name), signal.SIGKILL)

    monkeypatch.setattr(searching, "SearchWorker", Watched)
    undisturbed, task = tasks_in(tmp_path / "out", stores)[1], tasks_in(tmp_path / "again", stores)[1]
    search([task], RuntimeSettings(kind="ray", num_actors=2), query_block_rows=2, progress=kill_one)
    assert len(list(pids.iterdir())) >= 3
    monkeypatch.undo()
    search([undisturbed], LOCAL)
    assert task.output.read_bytes() == undisturbed.output.read_bytes()
