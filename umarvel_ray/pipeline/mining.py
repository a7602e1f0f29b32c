"""What surrounds the mining job: what it reads, the explanation of its filters, other tools' files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umarvel_ray.data.mbeir import Mbeir
from umarvel_ray.data.sources import chosen_tasks, local_pool_source, pool_sources, query_source
from umarvel_ray.data.trec import Qrels, Run, read_qrels
from umarvel_ray.errors import ConfigError
from umarvel_ray.pipeline.settings import MineConfig
from umarvel_ray.pipeline.view import View
from umarvel_ray.retrieve.settings import run_path
from umarvel_ray.storage import Place, at

FORMS = ("arrow", "mbeir", "n-tuple", "triplet", "trec")


@dataclass(frozen=True)
class MiningInputs:
    """What is mined.

    Attributes:
        parts: For each task its name, its run, the store of its queries and the stores of the candidates.
        qrels: All positives of the training queries.
        pool: All training candidates.
    """

    parts: list[tuple[str, Run, Place, list[Place]]]
    qrels: Qrels
    pool: Any

    @classmethod
    def of(cls, config: MineConfig) -> "MiningInputs":
        """Open what the settings name."""
        mbeir, embeddings = Mbeir(config.root), at(config.embeddings)
        tasks = chosen_tasks(mbeir, "train", config.tasks)
        qrels: Qrels = {}
        for dataset in mbeir.training_datasets():
            qrels |= mbeir.training_qrels(dataset)
        everything = pool_sources(mbeir, "train", tasks)
        parts = []
        for task in tasks:
            pools = everything if config.scope == "global" else [local_pool_source(mbeir, task, "train")]
            run = Run.read(run_path(config.search, "train", task.name, config.scope))
            queries = embeddings / query_source(mbeir, task, "train").name
            parts.append((task.name, run, queries, [embeddings / pool.name for pool in pools]))
        return cls(parts, qrels, mbeir.global_pool("train"))


def explain(config: MineConfig, view: View) -> Place:
    """What each filter would keep, as tables and as a page beside the job's output; returns the page.

    The output itself stays free: the mining that follows claims it for its settings.
    """
    from rich.table import Table

    from umarvel_ray.evaluate.explanation import PAGE, ROW_TITLES, explanation_rows, write_explanation
    from umarvel_ray.retrieve.explain import explain_run

    inputs = MiningInputs.of(config)
    explanation = explain_run(inputs.parts, inputs.qrels, inputs.pool, config.mining, seed=config.seed)
    output = at(config.output)
    folder = output.parent / f"{output.name}.explain"
    write_explanation(explanation, folder, title=f"Filters of {output.name}")
    for task, told in explanation["tasks"].items():
        table = Table(*ROW_TITLES, title=f"{task}: {told['queries']:,} queries", title_justify="left")
        for row in explanation_rows(told):
            table.add_row(*row)
        view.console.print(table)
    return folder / PAGE


def convert_negatives(
    source: Path,
    target: Path,
    *,
    read: str,
    write: str,
    queries: Path | None,
    qrels: Path | None,
    root: Path | None,
) -> dict[str, int]:
    """Turn mined negatives from one form into another.

    Args:
        source, target: The files.
        read, write: One of `FORMS`; arrow is ours.
        queries: M-BEIR query file to fill, for `mbeir`.
        qrels: Judgements, for tuples.
        root: M-BEIR's: tuples then hold texts instead of ids.

    Returns:
        Queries and negatives written, and queries without any.

    Raises:
        ConfigError: A form is unknown, or needs a file that is not given.
        DataError: A file is broken.
    """
    from umarvel_ray.retrieve.exchange import (
        Exchanged,
        read_neg_cand_list,
        read_trec,
        read_tuples,
        write_neg_cand_list,
        write_trec,
        write_tuples,
    )
    from umarvel_ray.retrieve.negatives import MinedNegatives

    readers: dict[str, Callable[[Path], MinedNegatives]] = {
        "arrow": MinedNegatives.read,
        "mbeir": read_neg_cand_list,
        "n-tuple": read_tuples,
        "triplet": read_tuples,
        "trec": read_trec,
    }
    for form in (read, write):
        if form not in FORMS:
            raise ConfigError(f"negatives: the form {form!r} is unknown. Give one of {', '.join(FORMS)}.")
    mined = readers[read](source)
    if write == "arrow":
        mined.write(target)
        done = Exchanged(len(mined), sum(map(len, mined.as_dict().values())), 0)
    elif write == "mbeir":
        done = write_neg_cand_list(mined, _given(queries, "--queries", write), target)
    elif write == "trec":
        done = write_trec(mined, target, "umarvel")
    else:
        query_text, candidate_text = _texts(root) if root else (str, str)
        done = write_tuples(
            mined,
            target,
            query_text=query_text,
            candidate_text=candidate_text,
            positives=read_qrels(_given(qrels, "--qrels", write)),
            form=write,
        )
    return {"queries": done.queries, "negatives": done.negatives, "without": done.without}


def _given(path: Path | None, option: str, form: str) -> Path:
    if path is None:
        raise ConfigError(f"negatives: {form} needs {option}.")
    return path


def _texts(root: Path) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """Texts of training queries and candidates by id; a record without text stands for itself."""
    mbeir = Mbeir(root)
    pool = mbeir.global_pool("train")
    texts = {
        record.query.qid: record.query.txt or record.query.qid
        for dataset in mbeir.training_datasets()
        for record in mbeir.training_queries(dataset)
    }

    def candidate(did: str) -> str:
        row = pool.find(did)
        return did if row is None else pool.candidate(row).txt or did

    return lambda qid: texts.get(qid, qid), candidate
