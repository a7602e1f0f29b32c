"""What one step of the reranker does: judged pairs, next-token loss on the answer. T tokens, V vocabulary."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from umarvel_ray.data.batches import (
    BatchPlan,
    TrainingItem,
    TrainingSet,
    deal,
    filler_record,
    token_cost,
)
from umarvel_ray.data.records import Candidate
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.model.trees import Tree
from umarvel_ray.train.grad_cache import lacks, lane_chunks
from umarvel_ray.train.loaders import Loaders
from umarvel_ray.train.losses import answer_loss
from umarvel_ray.train.settings import RerankerTrainSettings
from umarvel_ray.train.strategy import Replicated, Run


@dataclass(frozen=True, slots=True)
class PreparedPairs:
    """The trees of the lanes computed here, and how many pairs the global batch has."""

    qids: list[str]
    trees_by_lane: dict[int, list[Tree]]
    answers_by_lane: dict[int, list[list[bool]]]
    num_pairs: int
    filler: Tree | None


class RerankerTask:
    """Steps of the reranker over one training set."""

    def __init__(
        self,
        reranker: Reranker,
        data: TrainingSet,
        settings: RerankerTrainSettings,
        *,
        plan: BatchPlan,
        strategy: Replicated,
        max_tokens: int,
        seed: int,
        num_loaders: int = 0,
    ) -> None:
        self.model = reranker
        self._data = data
        self._settings = settings
        self._plan = plan
        self._strategy = strategy
        self._lanes = strategy.lanes
        self._max_tokens = max_tokens
        self._seed = seed
        self._loaders = Loaders(reranker.builder, num_loaders)
        if strategy.lockstep:
            reranker.keep_pictures(0)  # a worker that knows a picture would pass over the vision tower

    def prepare(self, step: int) -> PreparedPairs:
        """The pairs of a step: a pure function of it."""
        return self._prepare(*self._plan.rows(step))

    def _prepare(self, rows: np.ndarray, epoch: int) -> PreparedPairs:
        items = [
            self._draw(self._data.item(int(row), visit=epoch), row=int(row), visit=epoch) for row in rows
        ]
        costs = [token_cost(item.query) + sum(map(token_cost, _shown(item))) for item in items]
        dealt = deal(costs, self._lanes.count)
        trees, answers = {}, {}
        for lane in self._lanes.mine:
            mine = [items[index] for index in dealt[lane]]
            answers[lane] = [
                [True] * (1 + len(item.more_positives)) + [False] * len(item.others) for item in mine
            ]
            trees[lane] = self._loaders.build(
                [
                    (item.query, _shown(item), verdicts)
                    for item, verdicts in zip(mine, answers[lane], strict=True)
                ]
            )
        return PreparedPairs(
            qids=[item.query.qid for item in items],
            trees_by_lane=trees,
            answers_by_lane=answers,
            num_pairs=sum(len(_shown(item)) for item in items),
            filler=self._filler(items) if self._strategy.lockstep else None,
        )

    def _filler(self, items: list[TrainingItem]) -> Tree:
        """One pair with a picture, if there is any: what a lane runs that lacks one, or has nothing to do."""
        record = filler_record([record for item in items for record in (item.query, *_shown(item))])
        item = next(item for item in items if record in (item.query, *_shown(item)))
        shown = record if isinstance(record, Candidate) else item.positive
        return self.model.builder.build(item.query, [shown], [True])

    def _draw(self, item: TrainingItem, *, row: int, visit: int) -> TrainingItem:
        rng = np.random.default_rng([self._seed, row, visit])
        settings = self._settings
        num_more = min(settings.positives - 1, len(item.more_positives))
        others = item.others[: settings.window]
        num = min(settings.negatives_per_positive * (1 + num_more), len(others))
        chosen = rng.choice(len(others), size=num, replace=False) if num else []
        more = rng.choice(len(item.more_positives), size=num_more, replace=False) if num_more else []
        return TrainingItem(
            query=item.query,
            positive=item.positive,
            others=tuple(others[int(index)] for index in chosen),
            scores=None,
            relevant=item.relevant,
            more_positives=tuple(item.more_positives[int(index)] for index in more),
        )

    def samples(self, prepared: PreparedPairs) -> list[str]:
        """Ids to name in an error."""
        return prepared.qids

    def backward(self, prepared: PreparedPairs, *, seed: int) -> dict[str, float]:
        """Leave the gradient of the mean over all pairs; return figures for the log."""
        return self._pass(prepared, seed=seed, perform=self._strategy.backward)

    def validate(self) -> dict[str, float]:
        """Loss over held-out pairs, and as score the share that is judged right."""

        def perform(runs: Mapping[int, Sequence[Run]]) -> None:
            with torch.no_grad():
                for run in (run for of_lane in runs.values() for run in of_lane):
                    run()

        self.model.eval()
        figures = self._pass(self._prepare(self._plan.held_out, 0), seed=0, perform=perform)
        self.model.train()
        return {"loss": figures["loss"], "score": figures["accuracy"]}

    def _pass(
        self,
        prepared: PreparedPairs,
        *,
        seed: int,
        perform: Callable[[Mapping[int, Sequence[Run]]], None],
    ) -> dict[str, float]:
        lanes, filler = self._lanes, prepared.filler
        figures = {lane: torch.zeros(2, device=self._strategy.device) for lane in lanes.mine}
        filled = filler is not None
        chunks = lane_chunks(prepared.trees_by_lane, self._max_tokens, lanes=lanes, filled=filled)

        def run(lane: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
            torch.manual_seed(hash((seed, lane, number)) % 2**63)
            trees = [prepared.trees_by_lane[lane][i] for i in chunks[lane][number]]
            answers = [prepared.answers_by_lane[lane][i] for i in chunks[lane][number]]
            weights = [1.0] * len(trees)
            if filler is not None and lacks(trees, filler):
                trees, answers, weights = [*trees, filler], [*answers, [True]], [*weights, 0.0]
            loss, num_right = self._strategy.run(self._chunk, trees, answers, weights)
            figures[lane] += torch.stack([loss.detach(), num_right])
            return loss / prepared.num_pairs, torch.ones_like(loss)

        perform({lane: [partial(run, lane, n) for n in range(len(own))] for lane, own in chunks.items()})
        loss, right = (lanes.sum([figures[lane] for lane in lanes.mine]) / prepared.num_pairs).tolist()
        return {
            "loss": loss,
            "accuracy": right,
            "num_queries": len(prepared.qids),
            "num_pairs": prepared.num_pairs,
        }

    def _chunk(
        self, trees: list[Tree], answers: list[list[bool]], weights: list[float]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss over the pairs of some trees, each times its tree's weight, and how many it gets right.

        A pair's loss is the mean over its answer's tokens.
        """
        hidden_TD = self.model.hidden(trees)
        asking, target, weight, decisive, verdicts, counts = [], [], [], [], [], []
        start = 0
        for tree, tree_answers, of_tree in zip(trees, answers, weights, strict=True):
            ends = [*tree.leaf.searchsorted(np.arange(2, len(tree_answers) + 1)), tree.num_tokens]
            for first, end, answer in zip(tree.decisive, ends, tree_answers, strict=True):
                decisive.append(len(asking))
                verdicts.append(answer)
                counts.append(of_tree)
                span = range(int(first), int(end) - 1)
                asking += [start + place for place in span]
                target += [int(tree.ids[place + 1]) for place in span]
                scale = of_tree * (self._settings.positive_weight if answer else 1.0)
                weight += [scale / len(span)] * len(span)
            start += tree.num_tokens
        device = hidden_TD.device
        head = self.model.model.get_output_embeddings()
        logits_TV = head(hidden_TD[torch.tensor(asking, device=device)])
        loss_T = answer_loss(logits_TV, torch.tensor(target, device=device))
        ids = self.model.builder.answer_ids
        decisive_PV = logits_TV.detach()[torch.tensor(decisive, device=device)]
        says_yes = decisive_PV[:, ids[True]] > decisive_PV[:, ids[False]]
        is_right = says_yes == torch.tensor(verdicts, device=device)
        right = (is_right * torch.tensor(counts, device=device)).sum()
        return (loss_T * torch.tensor(weight, device=device)).sum(), right

    def after_step(self) -> None:
        """Nothing to bring back."""

    def close(self) -> None:
        """End what prepared the batches."""
        self._loaders.close()


def _shown(item: TrainingItem) -> list[Candidate]:
    """A drawn item's candidates, positives first."""
    return [item.positive, *item.more_positives, *item.others]
