"""The staged recipe as data: which job feeds which. Section and table numbers are the paper's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from umarvel_ray.config import Config
from umarvel_ray.evaluate.report import FusionInput, MiningInput, StageInput, TrainingInput
from umarvel_ray.pipeline.settings import (
    EvaluateConfig,
    MineConfig,
    ReportConfig,
    RerankerStage,
    RunConfig,
    TrainedStage,
)
from umarvel_ray.retrieve.settings import (
    EmbedConfig,
    MiningConfig,
    RerankConfig,
    RerankRequest,
    SearchConfig,
    SearchRequest,
    Split,
)
from umarvel_ray.storage import at
from umarvel_ray.train.settings import CHECKPOINT, CaptionData, MbeirData, NliData, StageConfig

_BASELINES = {
    "reranked": "hard",
    "distil": "hard",
    "distil_reranked": "distil",
    "in_batch": "instruct",
    "unfiltered": "instruct",
    "own_negatives": "instruct",
    "continue_hard": "hard",
}
"""From which column a column's gain is counted: the one that its training or its lists start from."""

_TAUGHT = {"reranked", "distil", "distil_reranked", "continue_hard"}
"""What needs the reranker."""


@dataclass(frozen=True)
class Job:
    """One step of a run: what to do, and all that decides it."""

    name: str
    kind: str
    title: str
    config: Config


def recipe(run: RunConfig) -> list[Job]:
    """All jobs of a run, in an order in which each finds what it reads."""
    plan = _Plan(run)
    stages, data = run.stages, run.data
    mbeir = MbeirData(kind="mbeir", root=data.root, tasks=data.train_tasks)
    wanted = {*run.columns, *run.controls}

    # 3.1 Progressive transition: text retrieval, cross-modal alignment, instruction tuning.
    start = run.backbone
    if stages.text is not None:
        sentences = NliData(kind="nli", path=data.nli)
        start = plan.train("text", "1a text retrieval", start, sentences, stages.text)
    if stages.align is not None:
        captions = CaptionData(kind="captions", path=data.captions, image_root=data.caption_images)
        start = plan.train("align", "1b cross-modal alignment", start, captions, stages.align)
    instruct = plan.train("instruct", "1c instruction tuning", start, mbeir, stages.instruct)
    ends_here = wanted <= {"instruct"}
    splits: tuple[Split, ...] = ("test",) if ends_here else ("train", "test")
    found = plan.retrieve("instruct", instruct, splits, train_scope="global")
    plan.evaluate("instruct", "1c instruct", instruct, found)
    if ends_here:
        plan.report()
        return plan.jobs

    # 3.2 Hard negatives, filtered, beside in-batch ones.
    negatives = plan.mine("negatives", found, "global", stages.hard.mining)
    hard_data = mbeir.model_copy(
        update={"lists": f"{negatives}/negatives.arrow", "num_negatives": stages.hard.num_negatives}
    )
    hard = plan.train("hard", "2 hard negatives", instruct, hard_data, stages.hard)
    is_taught = bool(wanted & _TAUGHT)
    splits = ("train", "val", "test") if is_taught else ("test",)
    found_hard = plan.retrieve("hard", hard, splits, train_scope="local" if is_taught else "")
    plan.evaluate("hard", "2 hard negatives", hard, found_hard)
    if is_taught:
        _teach(plan, run, mbeir, hard, found_hard)

    # Table 5: the same steps and batches with something left out.
    if "in_batch" in run.controls:
        plan.control("in_batch", "2 in-batch only", instruct, mbeir, stages.hard)
    if "unfiltered" in run.controls:
        rule = stages.hard.mining.model_copy(update={"rule": "none", "value": None})
        unfiltered = plan.mine("negatives_unfiltered", found, "global", rule)
        unfiltered_data = hard_data.model_copy(update={"lists": f"{unfiltered}/negatives.arrow"})
        plan.control("unfiltered", "2 unfiltered", instruct, unfiltered_data, stages.hard)
    if "own_negatives" in run.controls:
        own_data = hard_data.model_copy(update={"only_listed": True})
        plan.control("own_negatives", "2 own negatives", instruct, own_data, stages.hard, negatives="own")

    plan.report()
    return plan.jobs


def _teach(plan: "_Plan", run: RunConfig, mbeir: MbeirData, hard: str, found_hard: str) -> None:
    """What follows stage 2: reranker, distillation, U-MARVEL+."""
    stages = run.stages

    # 3.3 A reranker on what stage 2 finds; fused with it, it is the teacher.
    reranker = plan.train_reranker("reranker", stages.reranker, found_hard)
    depth, scopes = stages.reranker.depth, stages.reranker.scopes
    scored = plan.rerank(
        "reranked",
        reranker,
        found_hard,
        [
            RerankRequest(split="val", depth=depth),
            RerankRequest(split="train", depth=stages.distil.depth, share=stages.distil.share),
            RerankRequest(split="test", depth=depth, scopes=scopes),
        ],
        stages.reranker,
    )
    plan.evaluate("reranked", "2 + rerank", reranker, scored)

    # 3.3 Distillation into one encoder; 4 and appendix C, U-MARVEL+: what that one finds, re-ranked, by a
    # reranker trained on it or by the first.
    teacher = mbeir.model_copy(
        update={"lists": f"{scored}/teacher.arrow", "list_role": "teacher", "teacher": reranker}
    )
    distil = plan.train("distil", "3 distillation", hard, teacher, stages.distil)
    with_plus = stages.plus is not None and "distil_reranked" in run.columns
    splits: tuple[Split, ...] = ("train", "val", "test") if with_plus else ("test",)
    found_distil = plan.retrieve("distil", distil, splits, train_scope="local" if with_plus else "")
    plan.evaluate("distil", "3 distilled", distil, found_distil)
    if with_plus:
        assert stages.plus is not None
        reranker_plus = plan.train_reranker("reranker_plus", stages.plus, found_distil)
        requests = [
            RerankRequest(split="val", depth=stages.plus.depth),
            RerankRequest(split="test", depth=stages.plus.depth, scopes=stages.plus.scopes),
        ]
        scored_plus = plan.rerank("distil_reranked", reranker_plus, found_distil, requests, stages.plus)
        plan.evaluate("distil_reranked", "3 + rerank (U-MARVEL+)", reranker_plus, scored_plus)
    elif "distil_reranked" in run.columns:
        request = RerankRequest(split="test", depth=depth, scopes=scopes)
        scored_distil = plan.rerank(
            "distil_reranked", reranker, found_distil, [request], stages.reranker, alpha_from=scored
        )
        plan.evaluate("distil_reranked", "3 + rerank", reranker, scored_distil)

    # Table 6: the distillation's data as hard negatives.
    if "continue_hard" in run.controls:
        same_lists = mbeir.model_copy(update={"lists": f"{scored}/teacher.arrow", "only_listed": True})
        plan.control(
            "continue_hard",
            "3 continue-hard",
            hard,
            same_lists,
            stages.distil,
            kind="info_nce",
            negatives="own",
        )


class _Plan:
    """Collects jobs; each method adds one and returns where its product will be."""

    def __init__(self, run: RunConfig) -> None:
        self._run = run
        self.jobs: list[Job] = []
        self._columns: list[StageInput] = []
        self._curves: list[TrainingInput] = []
        self._mining: list[MiningInput] = []
        self._fusion: list[FusionInput] = []

    def _folder(self, kind: str, name: str) -> str:
        return str(at(self._run.output) / kind / name)

    def checkpoint(self, stage: str) -> str:
        """Where a training stage leaves its checkpoint."""
        return str(at(self._folder("train", stage)) / CHECKPOINT)

    def _add(self, kind: str, name: str, title: str, config: Config) -> None:
        self.jobs.append(Job(name=f"{kind}/{name}", kind=kind, title=title, config=config))

    def train(self, name: str, title: str, start: str, data: Any, stage: TrainedStage, **loss: Any) -> str:
        """A stage of the encoder; returns its checkpoint."""
        folder = self._folder("train", name)
        config = StageConfig(
            start=start,
            output=folder,
            seed=self._run.seed + stage.seed_offset,
            data=data,
            train=stage.train,
            loss=stage.loss.model_copy(update=loss),
            dtype=self._run.dtype,
            encoder=self._run.encoder if start == self._run.backbone else None,
        )
        self._add("train", name, f"train {title}", config)
        self._curves.append(TrainingInput(title=title, metrics=f"{folder}/metrics.jsonl"))
        return self.checkpoint(name)

    def train_reranker(self, name: str, stage: RerankerStage, found: str) -> str:
        """A reranker trained on what a search of the training queries found; returns its checkpoint."""
        lists = self.mine(f"{name}_lists", found, "local", stage.mining)
        data = MbeirData(
            kind="mbeir", root=self._run.data.root, lists=f"{lists}/negatives.arrow", only_listed=True
        )
        folder = self._folder("train", name)
        config = StageConfig(
            model="reranker",
            start=self._run.backbone if stage.start == "backbone" else self.checkpoint(stage.start),
            output=folder,
            seed=self._run.seed + stage.seed_offset,
            data=data,
            train=stage.train,
            pairs=stage.pairs,
            reranker=self._run.reranker,
            dtype=self._run.dtype,
        )
        title = name.replace("_plus", " for U-MARVEL+")
        self._add("train", name, f"train {title}", config)
        self._curves.append(TrainingInput(title=title, metrics=f"{folder}/metrics.jsonl"))
        return self.checkpoint(name)

    def retrieve(self, name: str, checkpoint: str, splits: Sequence[Split], train_scope: str = "") -> str:
        """Embed the splits' queries and pools and search them; returns the folder of runs."""
        how, root, tasks = self._run.retrieval, self._run.data.root, self._run.data.tasks
        embeddings, output = self._folder("embed", name), self._folder("search", name)
        self._add(
            "embed",
            name,
            f"embed with {name}",
            EmbedConfig(
                checkpoint=checkpoint,
                output=embeddings,
                root=root,
                splits=tuple(splits),
                tasks=tasks,
                instruction=how.instruction,
                seed=self._run.seed,
                rows_per_shard=how.rows_per_shard,
                window_rows=how.window_rows,
                duplicates=how.duplicates,
                bad_items=how.bad_items,
                max_bad_share=how.max_bad_share,
                dtype=how.dtype,
                compute_dtype=self._run.dtype,
                max_tokens=how.max_tokens,
                vision_store=how.vision_store,
            ),
        )
        scopes = {"train": (train_scope,), "val": ("local",), "test": ("local", "global")}
        self._add(
            "search",
            name,
            f"search with {name}",
            SearchConfig(
                embeddings=embeddings,
                output=output,
                root=root,
                requests=tuple(
                    SearchRequest.model_validate({"split": s, "scopes": scopes[s], "depth": how.depth})
                    for s in splits
                ),
                tasks=tasks,
                query_block_rows=how.query_block_rows,
            ),
        )
        return output

    def mine(self, name: str, search: str, scope: Any, mining: MiningConfig) -> str:
        """Hard negatives of the training queries; returns the folder."""
        folder = self._folder("mine", name)
        config = MineConfig(
            search=search,
            embeddings=self._folder("embed", at(search).name),
            output=folder,
            root=self._run.data.root,
            scope=scope,
            tasks=self._run.data.tasks,
            mining=mining,
            seed=self._run.seed,
        )
        self._add("mine", name, f"mine {name.replace('_', ' ')}", config)
        self._mining.append(MiningInput(title=name.replace("_", " "), report=f"{folder}/mining_report.json"))
        return folder

    def rerank(
        self,
        name: str,
        reranker: str,
        runs: str,
        requests: Sequence[RerankRequest],
        stage: RerankerStage,
        alpha_from: str | None = None,
    ) -> str:
        """Score and fuse runs; returns the folder of fused ones."""
        how, folder = self._run.retrieval, self._folder("rerank", name)
        config = RerankConfig(
            checkpoint=reranker,
            output=folder,
            root=self._run.data.root,
            runs=runs,
            requests=tuple(requests),
            tasks=self._run.data.tasks,
            seed=self._run.seed,
            fusion=stage.fusion,
            alpha=None if alpha_from else stage.alpha,
            weight=stage.weight,
            by_task=stage.by_task,
            alpha_from=alpha_from if stage.fusion == "alpha" else None,
            instruction=how.instruction,
            queries_per_shard=how.queries_per_shard,
            max_tokens=how.max_tokens,
            compute_dtype=self._run.dtype,
        )
        title = name.replace("_", " ")
        self._add("rerank", name, f"re-rank: {title}", config)
        if config.tunes:
            self._fusion.append(FusionInput(title=title, alpha=f"{folder}/alpha.json"))
        return folder

    def evaluate(self, name: str, title: str, checkpoint: str, runs: str) -> None:
        """Results of a stage on the test split, if the run wants that column."""
        if name not in (*self._run.columns, *self._run.controls):
            return
        folder = self._folder("evaluate", name)
        config = EvaluateConfig(
            stage=title,
            checkpoint=checkpoint,
            runs=runs,
            output=folder,
            root=self._run.data.root,
            scopes=self._run.stages.reranker.scopes if "reranked" in name else ("local", "global"),
            tasks=self._run.data.tasks,
        )
        self._add("evaluate", name, f"evaluate {title}", config)
        self._columns.append(
            StageInput(
                name=name,
                title=title,
                results=f"{folder}/results.json",
                runs=f"{runs}/test",
                baseline=_BASELINES.get(name),
            )
        )

    def control(self, name: str, title: str, start: str, data: Any, stage: TrainedStage, **loss: Any) -> None:
        """A stage trained with something left out, and its results."""
        checkpoint = self.train(name, title, start, data, stage, **loss)
        self.evaluate(name, title, checkpoint, self.retrieve(name, checkpoint, ("test",)))

    def report(self) -> None:
        """The page about everything."""
        names = [column.name for column in self._columns]
        if not names:
            return
        config = ReportConfig(
            title=self._run.title,
            output=str(at(self._run.output) / "report"),
            data=self._run.data.root,
            # A gain counted from a column that the run leaves out is counted from the left neighbour.
            stages=tuple(
                column if column.baseline in names else column.model_copy(update={"baseline": None})
                for column in self._columns
            ),
            training=tuple(self._curves),
            mining=tuple(self._mining),
            fusion=tuple(self._fusion),
            before=names[0],
            after="distil" if "distil" in names else names[-1],
        )
        self._add("report", "report", "report", config)
