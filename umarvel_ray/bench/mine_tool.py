"""Hard negatives end to end against `mine_hard_negatives` of Sentence Transformers, on the same vectors.

Its encoder is replaced by a look-up, so that neither side encodes: timed are the search, positives out, and
the best of the rest by name. Each query's positive is its nearest candidate.
"""

from functools import partial
from typing import Any

import numpy as np

from umarvel_ray.bench.harness import Answer, Benchmark, BenchmarkError, Case, Prepared
from umarvel_ray.bench.mine import clustered_vectors


def _sentence_transformers(case: Case, *, use_faiss: bool = False) -> Prepared:
    """`mine_hard_negatives` end to end, its encoder replaced by a look-up of the same vectors."""
    import datasets  # pyright: ignore[reportMissingImports]
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    queries, pool = clustered_vectors(case)
    num_queries = case["queries"]

    class LookUp(SentenceTransformer):
        """Texts are numbers of rows: q7 a query's, c7 a candidate's."""

        def encode(self, sentences: Any = None, *args: Any, **kwargs: Any) -> Any:
            texts = list(sentences if sentences is not None else kwargs["inputs"])
            rows = torch.tensor([int(text[1:]) for text in texts])
            return (queries if texts and texts[0][0] == "q" else pool)[rows].numpy()

        encode_query = encode_document = encode  # pyright: ignore[reportAssignmentType]

        def get_embedding_dimension(self) -> int:
            """Width of the vectors."""
            return case["dim"]

    model = LookUp(modules=[torch.nn.Identity()], device="cpu")
    positive_Q = torch.cat([(part @ pool.T).argmax(dim=1) for part in queries.split(512)])
    names = [f"c{row}" for row in range(len(pool))]
    pairs = datasets.Dataset.from_dict(
        {
            "anchor": [f"q{i}" for i in range(num_queries)],
            "positive": [names[row] for row in positive_Q.tolist()],
        }
    )

    def run() -> Answer:
        mined = mine_hard_negatives(
            pairs,
            model,
            anchor_column_name="anchor",
            positive_column_name="positive",
            corpus=names,
            range_max=case["k"],
            num_negatives=case["negatives"],
            sampling_strategy="top",
            output_format="n-tuple",
            batch_size=1024,
            use_faiss=use_faiss,
            faiss_batch_size=16_384,
            verbose=False,
        )
        columns = [mined[f"negative_{i + 1}"] for i in range(case["negatives"])]
        rows = np.array([[int(name[1:]) for name in column] for column in columns]).T
        order = np.argsort([int(name[1:]) for name in mined["anchor"]])
        return {"negatives": rows[order], "anchors": np.sort([int(n[1:]) for n in mined["anchor"]])}

    return Prepared(run=run, work=num_queries)


def _ours_end_to_end(case: Case) -> Prepared:
    """The same job as `mine_hard_negatives`: search, positives out, the best of the rest by name."""
    import pyarrow as pa

    from umarvel_ray.data.trec import Run
    from umarvel_ray.retrieve.mine import mine_negatives
    from umarvel_ray.retrieve.search import top_k
    from umarvel_ray.retrieve.settings import MiningConfig

    queries, pool = clustered_vectors(case)
    qids = [f"q{i}" for i in range(case["queries"])]
    names = pa.array([f"c{row}" for row in range(len(pool))])
    best = top_k(queries, pool, 1)
    nearest = names.take(pa.array(best.rows_QK[:, 0])).to_pylist()
    positives = {qid: {name: 1} for qid, name in zip(qids, nearest, strict=True)}
    config = MiningConfig(rule="none", depth=case["k"] + 1, num_negatives=case["negatives"])

    def run() -> Answer:
        found = top_k(queries, pool, case["k"] + 1)
        offsets = pa.array(np.arange(len(qids) + 1, dtype=np.int32) * found.rows_QK.shape[1])
        run_ = Run.from_table(
            pa.table(
                {
                    "qid": qids,
                    "did": pa.ListArray.from_arrays(offsets, names.take(pa.array(found.rows_QK.reshape(-1)))),
                    "score": pa.ListArray.from_arrays(offsets, pa.array(found.scores_QK.reshape(-1))),
                }
            )
        )
        mined, _ = mine_negatives(run_, positives, {}, {}, config, seed=0)
        dids, mined_qids = (mined.table.column(name).to_pylist() for name in ("did", "qid"))
        return {
            "negatives": np.array([[int(name[1:]) for name in some] for some in dids]),
            "anchors": np.array([int(qid[1:]) for qid in mined_qids]),
        }

    return Prepared(run=run, work=case["queries"])


def _compare(case: Case, ours: Answer, other: Answer) -> str:
    if not np.array_equal(ours["anchors"], other["anchors"]):
        raise BenchmarkError(f"{len(ours['anchors'])} queries of ours, {len(other['anchors'])} of theirs")
    same = float((ours["negatives"] == other["negatives"]).mean())
    if same < 0.999:
        raise BenchmarkError(f"only {same:.4%} of the negatives are the same")
    return f"{same:.4%} of the negatives the same, in order"


BENCHMARK = Benchmark(
    about="The 5 hardest of the top 100 for each query, its positive out, from vectors to names.",
    unit="queries",
    methods={
        "ours": _ours_end_to_end,
        "mine_hard_negatives, Torch": _sentence_transformers,
        "mine_hard_negatives, faiss": partial(_sentence_transformers, use_faiss=True),
    },
    cases={
        "d1024": {"queries": 2_000, "candidates": 200_000, "dim": 1024, "k": 100, "negatives": 5},
        "small": {"queries": 300, "candidates": 5_000, "dim": 64, "k": 50, "negatives": 5},
    },
    quick=("small",),
    compare=_compare,
    repeats=1,
)
