"""The evaluation job: from a model, stored vectors or runs to `results.json`, over M-BEIR, own data or
zero-shot sets, with the gates that keep a broken input from getting a figure.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from umarvel_ray.artifacts import atomic_write, file_fingerprint, read_json, write_json
from umarvel_ray.data.mbeir import Mbeir, Task, content_key
from umarvel_ray.data.own import RecordSource, read_own
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.data.sources import (
    InstructionChoice,
    PoolSource,
    QuerySource,
    RecordReader,
    chosen_tasks,
    local_pool_source,
    pool_sources,
    query_source,
    scope_pools,
)
from umarvel_ray.data.trec import Run
from umarvel_ray.errors import DataError
from umarvel_ray.evaluate.analysis import PoolIndex
from umarvel_ray.evaluate.benchmark import (
    QueryScores,
    assemble_results,
    average_prompts,
    evaluate_run,
    headline,
    query_scores,
    results_document,
)
from umarvel_ray.evaluate.exports import (
    retrieved_candidates,
    uniir_run_name,
    write_uniir_run,
    write_uniir_table,
)
from umarvel_ray.evaluate.parts import LIST_DEFINITION, Part, judged_lists, part_results, ranked_values
from umarvel_ray.evaluate.zeroshot import read_sets
from umarvel_ray.evaluate.zeroshot_pools import circo_submission
from umarvel_ray.pipeline.jobs import Summary, settings_of
from umarvel_ray.pipeline.settings import EvaluateConfig
from umarvel_ray.pipeline.vectors import Vectors
from umarvel_ray.pipeline.versions import library_versions
from umarvel_ray.pipeline.view import View
from umarvel_ray.retrieve.fusion import fuse
from umarvel_ray.retrieve.scores import Scores
from umarvel_ray.retrieve.settings import RerankConfig, RerankRequest, run_path
from umarvel_ray.retrieve.store import EmbeddingStore
from umarvel_ray.runtime.cluster import RuntimeSettings
from umarvel_ray.storage import Place, at

QUERIES_FILE = "queries.arrow"
"""Each query's own figures, beside the results: what a comparison is computed from."""


def evaluate(config: EvaluateConfig, runtime: RuntimeSettings, view: View) -> Summary:
    """Do the whole job; see `EvaluateConfig`."""
    job = _Job(config, runtime, view)
    document = job.mbeir() if config.root is not None else job.parts()
    write_json(at(config.output) / "results.json", document)
    return {"mean": document["mean"], "flags": document["flags"]}


class _Job:
    """One evaluation; folders of what it makes on the way lie in its output."""

    def __init__(self, config: EvaluateConfig, runtime: RuntimeSettings, view: View) -> None:
        self.config, self.runtime, self.view = config, runtime, view
        self.output = at(config.output)
        self.vectors = Vectors(config, runtime, view)
        self._queries: list[tuple[str, str, QueryScores]] = []

    # M-BEIR

    def mbeir(self) -> dict[str, Any]:
        """Score the tasks of a split."""
        config = self.config
        mbeir = Mbeir(str(config.root))
        tasks = chosen_tasks(mbeir, config.split, config.tasks)
        choices = {task: self._choices(mbeir, task) for task in tasks}
        if config.runs is None:
            self._make_runs(mbeir, tasks, choices)
        pools = {source.name: source for source in pool_sources(mbeir, config.split, tasks)}
        modality_of = {
            local_pool_source(mbeir, task, config.split).name: task.candidate_modality for task in tasks
        }
        index = cache(
            lambda names: PoolIndex({name: (modality_of[name], _dids(pools[name])) for name in names})
        )
        reader = RecordReader(list(pools.values()))

        @cache
        def key_of(did: str) -> bytes | None:
            try:
                return content_key(reader.candidate(did))
            except DataError:  # OVEN's and InfoSeek's judgements name candidates of one another's pools
                return None

        @cache
        def rough_key_of(did: str) -> tuple[str | None, int] | None:
            try:
                candidate = reader.candidate(did)
                # Pictures of different sizes are different: few are read to the end.
                size = at(candidate.img_path).stat().st_size if candidate.img_path else 0
            except (DataError, OSError):
                return None
            return candidate.txt, size

        measured: dict[str, dict[Any, Any]] = {}
        for task in tasks:
            qrels = mbeir.qrels(task, config.split)
            measured[task.name] = {}
            for scope in config.scopes:
                found = scope_pools(mbeir, task, config.split, scope, tasks)
                if not found:
                    continue
                runs = [self._run(task, scope, choice) for choice in choices[task]]
                results = [
                    evaluate_run(
                        task,
                        run,
                        qrels,
                        pool_dids=index(tuple(source.name for source in found)),
                        content_key=key_of if config.copies else None,
                        rough_key=rough_key_of,
                    )
                    for run in runs
                ]
                many = len(results) > 1
                measured[task.name][scope] = average_prompts(results, headline(task)) if many else results[0]
                self._keep(task.name, scope, [query_scores(task, run, qrels) for run in runs])
                self._export(mbeir, task, scope, runs[0], found)
        if "uniir" in config.export:
            write_uniir_table(
                self.output / "uniir" / "final_tsv" / "eval_results.tsv", measured, config.split
            )
        prompts = mbeir.instructions()
        document = assemble_results(
            measured,
            stage=config.stage,
            checkpoint=self._checkpoint(),
            settings=self._settings()
            | {
                "data": {
                    "kind": "mbeir",
                    "root": str(config.root),
                    "split": config.split,
                    "pools": {name: source.fingerprint for name, source in pools.items()},
                    "qrels": {
                        task.name: file_fingerprint(mbeir.qrels_path(task, config.split)) for task in tasks
                    },
                },
                "prompts": {
                    task.name: list(
                        prompts.prompts(task.dataset_id, task.query_modality, task.candidate_modality)
                    )
                    for task in tasks
                },
            },
            versions=library_versions(),
        )
        self._write_queries()
        return document

    def _choices(self, mbeir: Mbeir, task: Task) -> list[InstructionChoice]:
        choice = self.config.instruction
        if choice != "all":
            return [choice]
        prompts = mbeir.instructions().prompts(task.dataset_id, task.query_modality, task.candidate_modality)
        return list(range(len(prompts)))

    def _make_runs(
        self, mbeir: Mbeir, tasks: Sequence[Task], choices: Mapping[Task, Sequence[InstructionChoice]]
    ) -> None:
        config = self.config
        queries: dict[tuple[Task, InstructionChoice], QuerySource] = {
            (task, choice): query_source(mbeir, task, config.split, choice=choice, seed=config.seed)
            for task in tasks
            for choice in choices[task]
        }
        embeddings = self.vectors.stores_of([*queries.values(), *pool_sources(mbeir, config.split, tasks)])
        from umarvel_ray.runtime.scoring import Wanted

        wanted = [
            Wanted(source.name, tuple(pool.name for pool in pools), self._run_path(task, scope, choice))
            for (task, choice), source in queries.items()
            for scope in config.scopes
            if (pools := scope_pools(mbeir, task, config.split, scope, tasks))
        ]
        self.vectors.score(embeddings, wanted)
        if config.rerank is not None:
            self._rerank_mbeir(str(config.root))

    def _rerank_mbeir(self, root: str) -> None:
        from umarvel_ray.pipeline.jobs import rerank

        config, choice = self.config, self.config.rerank
        assert choice is not None
        if config.instruction == "all":
            raise DataError(
                "rerank: hits are scored again with one instruction. Choose one for the evaluation."
            )
        request = RerankRequest(
            split=config.split,
            scopes=tuple(scope for scope in config.scopes if scope != "pair"),
            depth=choice.depth,
        )
        rerank(
            RerankConfig(
                checkpoint=choice.checkpoint,
                output=str(self.output / "reranked"),
                root=root,
                runs=str(self.output / "runs"),
                requests=(request,),
                tasks=config.tasks,
                seed=config.seed,
                alpha=choice.alpha,
                alpha_from=choice.alpha_from,
                instruction=config.instruction,
                max_tokens=config.max_tokens,
                compute_dtype=config.compute_dtype,
            ),
            self.runtime,
            self.view,
        )

    def _run_path(self, task: Task, scope: str, choice: InstructionChoice) -> Place:
        folder = self.output / "runs"
        if self.config.instruction == "all":
            folder = folder / f"prompt-{choice}"
        return run_path(folder, self.config.split, task.name, scope)

    def _run(self, task: Task, scope: str, choice: InstructionChoice) -> Run:
        config = self.config
        if config.runs is not None:
            return Run.read(run_path(config.runs, config.split, task.name, scope))
        if config.rerank is not None and scope != "pair":
            return Run.read(run_path(self.output / "reranked", config.split, task.name, scope))
        return Run.read(self._run_path(task, scope, choice))

    def _export(self, mbeir: Mbeir, task: Task, scope: str, run: Run, pools: Sequence[PoolSource]) -> None:
        wanted = self.config.export
        if not wanted or scope == "pair":
            return
        name = uniir_run_name(task, scope, self.config.split, depth=max(map(len, run.dids)))
        if "uniir" in wanted:
            write_uniir_run(self.output / "uniir" / "run_files" / f"{name}_run.txt", run, task, name)
        if {"candidates", "complements"} & set(wanted):
            complements = None
            if "complements" in wanted:
                complements = self._complements(mbeir, task, scope, run, pools)
            path = self.output / "retrieved_candidates" / f"{name}_retrieved.jsonl"
            retrieved_candidates(path, run, mbeir, task, self.config.split, pools, complements)

    def _complements(
        self, mbeir: Mbeir, task: Task, scope: str, run: Run, pools: Sequence[PoolSource]
    ) -> dict[str, list[str]]:
        """For each retrieved text or picture the hits of the opposite modality, asked with MSCOCO's
        sentence."""
        from umarvel_ray.runtime.scoring import Wanted

        reader, prompts = RecordReader(pools), mbeir.instructions()
        asked: list[Query] = []
        for did in dict.fromkeys(did for dids in run.dids for did in dids[: task.headline_k]):
            candidate = reader.candidate(did)
            opposite = {"text": "image", "image": "text"}.get(candidate.modality)
            if opposite is not None:
                words = prompts.prompts(9, candidate.modality, opposite)[0]
                asked.append(Query(did, txt=candidate.txt, img_path=candidate.img_path, instruction=words))
        if not asked:
            return {}
        source = RecordSource(f"complements/{task.name}.{scope}", tuple(asked))
        # Their stores stand in two folders, so both are named whole.
        queries = self.vectors.embedded_now([source]) / source.name
        embeddings = self.vectors.stores_of(pools)
        path = self.output / "runs" / "complements" / f"{task.name}.{scope}.arrow"
        wanted = Wanted(str(queries), tuple(str(embeddings / pool.name) for pool in pools), path)
        self.vectors.score(embeddings, [wanted])
        found = Run.read(path)
        return {qid: list(dids[:10]) for qid, dids in zip(found.qids, found.dids, strict=True)}

    # Own data and zero-shot sets

    def parts(self) -> dict[str, Any]:
        """Score the parts of own data or of zero-shot sets."""
        config = self.config
        groups = self._read_parts()
        everything = [part for parts in groups.values() for part in parts]
        sources = [source for part in everything for source in _part_sources(part)]
        embeddings = self.vectors.stores_of(sources)
        from umarvel_ray.runtime.scoring import Wanted

        pooled = [part for part in everything if part.lists is None]
        wanted = [
            Wanted(*(_names(part)[0], (_names(part)[1],)), self.output / "runs" / f"{_slug(part.name)}.arrow")
            for part in pooled
        ]
        self.vectors.score(embeddings, wanted)
        tasks: dict[str, Any] = {}
        for group, parts in groups.items():
            for part in parts:
                if part.lists is not None:
                    values = judged_lists(part, self._list_scores(embeddings, part))
                    run = None
                else:
                    run = Run.read(self.output / "runs" / f"{_slug(part.name)}.arrow")
                    run = self._rerank_part(part, run)
                    if not part.qrels:
                        ranking = dict(zip(run.qids, run.dids, strict=True))
                        answers = circo_submission(ranking, num_queries=len(part.queries))
                        write_json(self.output / "submissions" / f"{group}.json", answers)
                        continue
                    values = ranked_values(part, dict(zip(run.qids, run.dids, strict=True)))
                tasks[part.name] = part_results(part, values)
                ranks = _first_ranks(part, run)
                scores = QueryScores(tuple(q.qid for q in part.queries), values[part.metrics[0]], ranks)
                self._queries.append((part.name, "local", scores))
        document = results_document(
            tasks,
            stage=config.stage,
            checkpoint=self._checkpoint(),
            settings=self._settings()
            | {
                "data": {
                    "kind": "own" if config.own else "zeroshot",
                    "protocol": config.zeroshot.protocol if config.zeroshot else None,
                    "parts": {part.name: part.fingerprint for part in everything},
                    "files": {
                        str(file): file_fingerprint(file) for part in everything for file in part.files[:4]
                    },
                    "ties": {part.name: part.ties for part in everything if part.lists is not None},
                },
                "prompts": {
                    part.name: sorted({query.instruction or "" for query in part.queries})[:8]
                    for part in everything
                },
                "sets": {group: _set_figures(parts, tasks) for group, parts in groups.items()},
            },
            versions=library_versions(),
            definition=LIST_DEFINITION,
        )
        self._write_queries()
        return document

    def _read_parts(self) -> dict[str, list[Part]]:
        config = self.config
        if config.zeroshot is not None:
            return read_sets(config.zeroshot.sets, config.zeroshot.root, config.zeroshot.protocol)
        own = config.own
        assert own is not None
        queries, candidates, qrels = read_own(
            own.queries, own.candidates, own.images, instruction=own.instruction
        )
        kinds = {query.modality for query in queries}, {candidate.modality for candidate in candidates}
        kind = " → ".join(" or ".join(sorted(kinds_of)).replace(",", "+") for kinds_of in kinds)
        part = Part(
            "own data",
            kind,
            queries,
            candidates,
            qrels,
            own.metrics,
            files=(Path(own.queries), Path(own.candidates)),
        )
        return {"own": [part]}

    def _list_scores(self, embeddings: Place, part: Part) -> Any:
        """(qid, dids) → scores of a query's own list, by the formula of the search."""
        import torch

        from umarvel_ray.retrieve.scoring import exact_scores

        names = _names(part)
        queries, pool = (EmbeddingStore.open(embeddings / name) for name in names)
        row_of_query = {qid: row for row, qid in enumerate(queries.ids.to_pylist())}
        row_of = {did: row for row, did in enumerate(pool.ids.to_pylist())}
        again = self._rerank_lists(part)

        def scores(qid: str, dids: Sequence[str]) -> np.ndarray:
            query = torch.from_numpy(queries.gather(np.array([row_of_query[qid]] * len(dids))))
            cosine = exact_scores(
                query, torch.from_numpy(pool.gather(np.array([row_of[did] for did in dids])))
            ).numpy()
            if again is None:
                return cosine
            alpha, p_yes = again
            return alpha * cosine + (1 - alpha) * np.array(
                [p_yes[qid][did] for did in dids], dtype=np.float32
            )

        return scores

    def _alpha(self) -> float:
        choice = self.config.rerank
        assert choice is not None
        if choice.alpha is not None:
            return choice.alpha
        return float(read_json(at(str(choice.alpha_from)) / "alpha.json")["alpha"])

    def _p_yes(
        self, part: Part, lists: Sequence[tuple[Query, Sequence[Candidate], Sequence[float]]]
    ) -> Scores:
        from umarvel_ray.retrieve.rerank_lists import ListReranker, ListTask
        from umarvel_ray.runtime.pool import run_pool

        choice = self.config.rerank
        assert choice is not None
        folder = self.output / "reranked" / _slug(part.name)
        tasks = [
            ListTask(tuple(lists[start : start + 64]), folder / f"{start:08d}.arrow")
            for start in range(0, len(lists), 64)
        ]
        missing = [task for task in tasks if not task.part.exists()]
        make = partial(
            ListReranker, choice.checkpoint, self.config.compute_dtype, max_tokens=self.config.max_tokens
        )
        with self.view.bar(f"re-ranking {part.name}", len(lists), unit="queries") as bar:
            for answer in run_pool(missing, make, self.runtime):
                bar.advance(answer["queries"])
        return Scores.concat([Scores.read(task.part) for task in tasks], {})

    def _rerank_part(self, part: Part, run: Run) -> Run:
        choice = self.config.rerank
        if choice is None:
            return run
        query_of = {query.qid: query for query in part.queries}
        record_of = {record.did: record for record in _plain_candidates(part)}
        lists = [
            (query_of[qid], [record_of[did] for did in dids[: choice.depth]], scores[: choice.depth].tolist())
            for qid, dids, scores in zip(run.qids, run.dids, run.scores, strict=True)
        ]
        return fuse(self._p_yes(part, lists), (self._alpha(), 1 - self._alpha()))

    def _rerank_lists(self, part: Part) -> tuple[float, dict[str, dict[str, float]]] | None:
        if self.config.rerank is None:
            return None
        assert part.lists is not None
        record_of = {record.did: record for record in _plain_candidates(part)}
        lists = [
            (query, [record_of[did] for did in part.lists[query.qid]], [0.0] * len(part.lists[query.qid]))
            for query in part.queries
        ]
        p_yes = {
            qid: dict(zip(dids, p.tolist(), strict=True))
            for qid, dids, _, p in self._p_yes(part, lists).rows()
        }
        return self._alpha(), p_yes

    # What is recorded

    def _keep(self, name: str, scope: str, scores: Sequence[QueryScores]) -> None:
        value_Q = np.mean([score.value_Q for score in scores], axis=0)
        self._queries.append((name, scope, QueryScores(scores[0].qids, value_Q, scores[0].rank_Q)))

    def _write_queries(self) -> None:
        """task, pool, qid, value, rank: one row per query and pool."""
        import pyarrow as pa

        kept = self._queries
        table = pa.table(
            {
                "task": pa.array(
                    [name for name, _, s in kept for _ in s.qids], pa.string()
                ).dictionary_encode(),
                "pool": pa.array(
                    [pool for _, pool, s in kept for _ in s.qids], pa.string()
                ).dictionary_encode(),
                "qid": pa.array([qid for _, _, s in kept for qid in s.qids], pa.string()),
                "value": pa.array(np.concatenate([s.value_Q for _, _, s in kept] or [np.zeros(0)])),
                "rank": pa.array(np.concatenate([s.rank_Q for _, _, s in kept] or [np.zeros(0, np.int64)])),
            }
        )
        with (
            atomic_write(self.output / QUERIES_FILE, "wb") as file,
            pa.ipc.new_file(file, table.schema) as writer,
        ):
            writer.write_table(table)

    def _checkpoint(self) -> dict[str, Any]:
        from umarvel_ray.retrieve.embed import checkpoint_fingerprint

        path = self.config.checkpoint
        if path is None:
            return {"path": None, "fingerprint": None}
        return {"path": path, "fingerprint": checkpoint_fingerprint(path)}

    def _settings(self) -> dict[str, Any]:
        """All that decides the figures, besides data and weights."""
        config = self.config
        runs = str(self.output / ("reranked" if config.rerank else "runs"))
        return {
            "made_from": "runs"
            if config.runs
            else "embeddings"
            if config.embeddings
            else "vectors"
            if config.vectors
            else "model",
            "runs": settings_of(config.runs) if config.runs else None,
            "runs_folder": config.runs or runs,
            "model": config.model.model_dump(mode="json"),
            "encoder": self._encoder_settings(),
            "instruction": config.instruction,
            "seed": config.seed,
            "depth": config.depth,
            "stored_dtype": config.dtype,
            "compute_dtype": config.compute_dtype,
            "scores": "float32, ties by row of the pool",
            "device": _device(config.compute_dtype),
            "rerank": None
            if config.rerank is None
            else config.rerank.model_dump(mode="json") | {"alpha": self._alpha()},
            "stores": self.vectors.looked_at,
        }

    def _encoder_settings(self) -> Any:
        path = at(self.config.checkpoint or ".") / "embedding.json"
        if self.config.checkpoint and path.exists():
            return read_json(path)["settings"]  # attention, pooling, prompts, pixel caps
        return None


def _dids(source: PoolSource) -> Iterable[str]:
    return (source[row].did for row in range(len(source)))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower().replace("→", "to")).strip("_")


def _names(part: Part) -> tuple[str, str]:
    """Stores of a part's queries and of its candidates."""
    return f"parts/{_slug(part.name)}/queries", f"parts/{_slug(part.name)}/candidates"


def _part_sources(part: Part) -> list[RecordSource[Any]]:
    return [
        RecordSource(name, tuple(records))
        for name, records in zip(_names(part), (part.queries, part.candidates), strict=True)
    ]


def _plain_candidates(part: Part) -> list[Candidate]:
    """Candidates as a reranker reads them: an instruction that a shared matrix put on them is left out."""
    return [
        Candidate(record.qid, txt=record.txt, img_path=record.img_path, parts=record.parts)
        if isinstance(record, Query)
        else record
        for record in part.candidates
    ]


def _first_ranks(part: Part, run: Run | None) -> np.ndarray:
    if run is None:
        return np.zeros(len(part.queries), dtype=np.int64)
    place = {qid: row for row, qid in enumerate(run.qids)}
    ranks = []
    for query in part.queries:
        right = part.qrels.get(query.qid, {})
        ranks.append(
            next((rank for rank, did in enumerate(run.dids[place[query.qid]], 1) if did in right), 0)
        )
    return np.array(ranks, dtype=np.int64)


def _set_figures(parts: Sequence[Part], tasks: Mapping[str, Any]) -> dict[str, Any]:
    """A set's one figure: the mean of its parts' headlines, and the mean over all their queries beside it."""
    entries = [tasks[part.name] for part in parts if part.name in tasks]
    if not entries:
        return {}
    values = [entry["local"][entry["headline"]] for entry in entries]
    counts = [entry["num_queries"] for entry in entries]
    return {
        "macro": float(np.mean(values)),
        "micro": float(np.average(values, weights=counts)),
        "parts": len(entries),
    }


def _device(dtype: str) -> dict[str, str]:
    import torch

    from umarvel_ray.model.attention import best_kernel
    from umarvel_ray.model.backbone import DTYPES

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return {"name": name, "attention_kernel": best_kernel(device, DTYPES[dtype])}
