"""The vectors of an evaluation: given, imported or embedded now, and looked at before any figure is made."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.data.sources import Source
from umarvel_ray.errors import DataError
from umarvel_ray.evaluate.analysis import vector_spread
from umarvel_ray.pipeline.jobs import embed
from umarvel_ray.pipeline.settings import EvaluateConfig
from umarvel_ray.pipeline.view import View
from umarvel_ray.retrieve.settings import EmbedConfig
from umarvel_ray.retrieve.store import EmbeddingStore
from umarvel_ray.retrieve.vectors import ids_beside, import_vectors
from umarvel_ray.runtime.cluster import RuntimeSettings
from umarvel_ray.storage import Place, at

_SAMPLE = 512
"""Rows of a store that are looked at before it is searched."""
_CONSTANT = 1e-5
"""Of unit vectors: where no column deviates more, all are one vector."""


class Vectors:
    """Stores of whatever an evaluation asks for.

    Attributes:
        looked_at: What each store holds, by name, for the results.
    """

    def __init__(self, config: EvaluateConfig, runtime: RuntimeSettings, view: View) -> None:
        self.config, self.runtime, self.view = config, runtime, view
        self.output = at(config.output)
        self.looked_at: dict[str, dict[str, Any]] = {}

    def stores_of(self, sources: Sequence[Source]) -> Place:
        """Where the stores of all sources are: given, imported, or embedded now; looked at before use."""
        config = self.config
        if config.embeddings is not None:
            folder = at(config.embeddings)
            self._look_at(folder, sources)
            return folder
        if config.vectors is None:
            return self.embedded_now(sources)
        folder = self.output / "embeddings"
        for source in sources:
            matrix = _find_matrix(Path(config.vectors), source.name)
            found = source.name.startswith("pools/") or source.name.endswith("/candidates")
            role: Literal["query", "candidate"] = "candidate" if found else "query"
            import_vectors(matrix, ids_beside(matrix), folder / source.name, role=role)
        self._look_at(folder, sources)
        return folder

    def embedded_now(self, sources: Sequence[Source]) -> Place:
        """Embed sources with the checkpoint, whatever else is given; where their stores are."""
        folder = self.output / "embeddings"
        embed(self._embed_config(folder), self.runtime, self.view, sources=sources)
        self._look_at(folder, sources)
        return folder

    def _embed_config(self, folder: Place) -> EmbedConfig:
        config = self.config
        return EmbedConfig(
            checkpoint=str(config.checkpoint),
            model=config.model,
            output=str(folder),
            root=config.root or "",
            splits=(config.split,),
            tasks=config.tasks,
            instruction="first" if config.instruction == "all" else config.instruction,
            seed=config.seed,
            rows_per_shard=config.rows_per_shard,
            dtype=config.dtype,
            compute_dtype=config.compute_dtype,
            max_tokens=config.max_tokens,
        )

    def _look_at(self, folder: Place, sources: Sequence[Source]) -> None:
        """The gates: vectors of one checkpoint, of this data, and more than one direction in space.

        Raises:
            DataError: Fingerprints are mixed, ids are others than the data's, or vectors are constant.
        """
        makers: dict[str, str] = {}
        for source in sources:
            store = EmbeddingStore.open(folder / source.name)
            made_by = store.settings.get("checkpoint")
            if made_by is not None:
                makers.setdefault(str(made_by), source.name)
            of_data = store.settings.get("source")
            if of_data is not None and of_data != source.fingerprint:
                raise DataError(
                    f"{store.folder}: embedded from other data or prompts ({of_data}) than {source.name} is "
                    f"now ({source.fingerprint}). Embed again, or give the root and instruction that were "
                    "embedded."
                )
            if len(store) != len(source):
                raise DataError(
                    f"{store.folder}: {len(store)} vectors, but {source.name} has {len(source)} records. "
                    "Give the vectors of this data."
                )
            self._match_ids(store, source)
            rows = np.linspace(0, len(store) - 1, min(_SAMPLE, len(store))).astype(np.int64)
            spread = vector_spread(store.gather(np.unique(rows))) if len(np.unique(rows)) > 1 else {}
            if spread and spread["largest_column_deviation"] < _CONSTANT:
                raise DataError(
                    f"{store.folder}: {len(np.unique(rows))} sampled vectors are all the same. The encoder "
                    "gives one vector for everything: check that weights and adapter were loaded, and its "
                    "dtype."
                )
            self.looked_at[source.name] = {
                "fingerprint": store.fingerprint,
                "rows": len(store),
                "stored_dtype": store.dtype,
                **{key: round(value, 6) for key, value in spread.items()},
            }
        if len(makers) > 1:
            (first, name), (second, other) = list(makers.items())[:2]
            raise DataError(
                f"{folder}: vectors of {len(makers)} checkpoints: {name} of {first}, {other} of {second}. "
                "Embed all with one."
            )

    def _match_ids(self, store: EmbeddingStore, source: Source) -> None:
        """The first, middle and last ids; every id of a small source."""
        rows = range(len(source)) if len(source) <= 4096 else (0, len(source) // 2, len(source) - 1)
        wanted = [_record_id(source[row]) for row in rows]
        ids = store.ids
        if len(source) <= 4096:
            strangers = set(wanted) - set(ids.to_pylist())
        else:
            import pyarrow.compute as pc

            strangers = {did for did in wanted if pc.index(ids, did).as_py() < 0}
        if strangers:
            raise DataError(
                f"{store.folder}: {len(strangers)} of {len(wanted)} ids of {source.name} that were looked "
                f"for have no vector (first: {sorted(strangers)[0]}; the store begins with "
                f"{ids[0].as_py()}). Ids never match: look how both files write them."
            )

    def score(self, embeddings: Place, wanted: Sequence[Any]) -> None:
        """Write the wanted runs, all in one pass over their pools."""
        from umarvel_ray.runtime.scoring import plan_scoring, score_all

        scratch = self.output / "scratch"
        plan = plan_scoring(embeddings, wanted, k=self.config.depth, scratch=scratch)
        if plan.segments:
            self.view.line(f"[dim]  {plan.line()}[/]")
        with self.view.bar("scoring", plan.num_candidates, unit="candidates") as bar:
            score_all(
                embeddings,
                wanted,
                self.runtime,
                k=self.config.depth,
                scratch=scratch,
                progress=lambda done, total: bar.at(done),
            )


def _record_id(record: Query | Candidate) -> str:
    return record.qid if isinstance(record, Query) else record.did


def _find_matrix(folder: Path, store: str) -> Path:
    """The `.npy` of a store: under its own name, or under UniIR's.

    Raises:
        DataError: There is none, or several.
    """
    direct = folder / f"{store}.npy"
    if direct.is_file():
        return direct
    *_, split, name = ["", *store.split("/")]
    uniir = (
        f"mbeir_{name}_{split}_embed.npy"
        if store.startswith("queries/")
        else f"mbeir_{name}_cand_pool_embed.npy"
    )
    found = sorted(folder.rglob(uniir))
    if len(found) != 1:
        raise DataError(
            f"{folder}: {len(found)} files for {store}: neither {store}.npy nor one {uniir}. Name the matrix "
            "so, with its ids beside it."
        )
    return found[0]
