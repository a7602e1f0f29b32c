"""The embedding stream around an encoder that costs nothing: how many rows a second everything else gets
through, from the line in the file to the row in the shard.

Ours on Ray, with readers ahead of the encoder, against the same functions in one process, and against the
plain loop that people write: read the whole file, tokenize, stack, `np.save`.
"""

import json
import resource
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from umarvel_ray.bench.harness import Answer, Benchmark, BenchmarkError, Case, Prepared
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.demo.backbone import BackboneConfig, make_backbone
from umarvel_ray.model.settings import EncoderSettings
from umarvel_ray.retrieve.embed import Model
from umarvel_ray.retrieve.settings import EmbedConfig

_DIM = 256
_WORDS = [
    f"{a}{b}" for a in ("red", "blue", "old", "new", "high", "small") for b in ("tower", "kite", "hill")
]


@dataclass(frozen=True)
class StubEmbedder:
    """Vectors from the tokens' sums: as good as any model for everything around it, and free.

    Attributes:
        builder: The real one.
        dim: Width.
    """

    builder: Any
    dim: int = _DIM

    def embed_items(self, items: Sequence[Any], *, max_tokens: int = 8192) -> Any:
        """An array (N, D) float32, unit norm; equal tokens and pixels give equal vectors."""
        seeds_N = np.array(
            [int(item.ids.sum()) % 9973 + 7 * item.num_tokens for item in items], dtype=np.float32
        )
        vectors_ND = np.cos(seeds_N[:, None] * np.arange(1, self.dim + 1, dtype=np.float32) / 97.0)
        return vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)


def stub_model(backbone: str) -> Model:
    """The tokenizer of a backbone, and no weights."""
    from functools import partial

    return Model(embedder=partial(_stub, backbone), builder=partial(_builder, backbone))


def _builder(backbone: str) -> Any:
    from umarvel_ray.model.encoder import load_input_builder

    return load_input_builder(backbone, settings=EncoderSettings())


def _stub(backbone: str) -> StubEmbedder:
    return StubEmbedder(_builder(backbone))


def text_line(row: int) -> str:
    """A candidate of thirty words, unlike all others."""
    words = " ".join(_WORDS[(row * 7 + step * step) % len(_WORDS)] for step in range(30))
    return json.dumps({"did": f"9:{row + 1}", "txt": f"{words} {row}", "img_path": None, "modality": "text"})


def write_text_pool(path: Path, num_rows: int) -> None:
    """A pool file of text candidates."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in range(num_rows):
            file.write(text_line(row) + "\n")


def _world(case: Case) -> tuple[Path, str]:
    """A folder with `pool.jsonl`, and a backbone; made in another process, whose memory is not ours."""
    folder = Path(tempfile.mkdtemp(prefix="umarvel-stream-"))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
        other.submit(_make_world, folder, case["rows"]).result()
    return folder, str(folder / "backbone")


def _make_world(folder: Path, rows: int) -> None:
    write_text_pool(folder / "pool.jsonl", rows)
    backbone = BackboneConfig(
        seed=0, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=64,
        vocab_size=600, vision_embed_dim=32, vision_depth=1, vision_num_heads=2,
    )  # fmt: skip
    make_backbone([" ".join(_WORDS)], folder / "backbone", backbone)


def _config(folder: Path, output: str) -> EmbedConfig:
    return EmbedConfig(
        checkpoint=str(folder / "backbone"),
        output=str(folder / output),
        root=str(folder),
        splits=(),
        pools=(str(folder / "pool.jsonl"),),
    )


def _ours(kind: str) -> Any:
    def prepare(case: Case) -> Prepared:
        from umarvel_ray.retrieve.embed import plan_stores
        from umarvel_ray.retrieve.store import EmbeddingStore
        from umarvel_ray.runtime.cluster import RuntimeSettings, connect
        from umarvel_ray.runtime.embedding import Progress, embed_stores

        folder, backbone = _world(case)
        runtime = RuntimeSettings.model_validate({"kind": kind, "readers": 2, "num_actors": 1})
        connect(runtime)
        runs = iter(range(1000))
        facts: dict[str, float] = {}  # filled by the runs
        began: list[float] = []

        def run() -> Answer:
            config = _config(folder, f"run{next(runs)}")
            began.clear()

            def note(progress: Progress) -> None:
                if progress.shards and not began:
                    began.extend([time.perf_counter(), progress.rows_done])

            progress = embed_stores(plan_stores(config), stub_model(backbone), config, runtime, note)
            if progress.rows_done > began[1]:  # what starts once, apart
                rate = (progress.rows_done - began[1]) / (time.perf_counter() - began[0])
                facts["rows_per_s_after_first_shard"] = rate
            # Of the first run: what is read back below, to compare, is mapped and would count.
            peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            facts.setdefault("driver_peak_mib", peak_kib / 2**10)
            facts["encoder_peak_mib"] = progress.encoder_peak_bytes / 2**20
            facts["reader_peak_mib"] = progress.reader_peak_bytes / 2**20
            facts["encoder_seconds"] = progress.busy_s
            store = EmbeddingStore.open(Path(config.output) / "pools" / "pool")
            rows = np.linspace(0, len(store) - 1, 500).astype(np.int64)
            return {"vectors": store.gather(rows), "count": np.array([len(store)])}

        return Prepared(run=run, work=case["rows"], facts=facts)

    return prepare


def _plain_loop(case: Case) -> Prepared:
    folder, backbone = _world(case)
    embedder = _stub(backbone)

    def run() -> Answer:
        ids, vectors = [], []
        with open(folder / "pool.jsonl", encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
        for start in range(0, len(records), 512):
            batch: list[Query | Candidate] = [
                Candidate(did=record["did"], txt=record["txt"]) for record in records[start : start + 512]
            ]
            vectors.append(embedder.embed_items([embedder.builder.build(record) for record in batch]))
            ids += [record["did"] for record in records[start : start + 512]]
        matrix = np.concatenate(vectors).astype(np.float16)
        np.save(folder / "plain.npy", matrix)
        np.save(folder / "plain_ids.npy", np.array(ids))
        rows = np.linspace(0, len(matrix) - 1, 500).astype(np.int64)
        return {"vectors": matrix[rows].astype(np.float32), "count": np.array([len(matrix)])}

    return Prepared(run=run, work=case["rows"])


def _compare(case: Case, ours: Answer, theirs: Answer) -> str:
    if ours["count"] != theirs["count"] or not np.array_equal(ours["vectors"], theirs["vectors"]):
        raise BenchmarkError("the stream and its peer wrote other vectors.")
    return "equal to the bit"


BENCHMARK = Benchmark(
    about="Rows a second around a free encoder, text, from file to shard",
    unit="rows",
    methods={"stream on Ray": _ours("ray"), "one process": _ours("local"), "plain loop": _plain_loop},
    cases={name: {"rows": rows} for name, rows in (("10k", 10_000), ("20k", 20_000), ("200k", 200_000))},
    quick=("20k",),
    compare=_compare,
    repeats=1,
    threads=1,
)
