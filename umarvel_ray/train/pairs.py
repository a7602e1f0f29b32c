"""What one step of the reranker does: judged pairs, next-token loss on the answer. T tokens, V vocabulary."""

from dataclasses import dataclass

import numpy as np
import torch

from umarvel_ray.data.batches import BatchPlan, TrainingItem, TrainingSet, deal, token_cost
from umarvel_ray.model.inputs import micro_batches
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.model.trees import Tree
from umarvel_ray.train.gather import Lanes
from umarvel_ray.train.grad_cache import sum_gradients
from umarvel_ray.train.losses import answer_loss
from umarvel_ray.train.settings import RerankerTrainSettings


@dataclass(frozen=True, slots=True)
class PreparedPairs:
    """The trees of the lanes computed here, and how many pairs the global batch has."""

    qids: list[str]
    trees_by_lane: dict[int, list[Tree]]
    answers_by_lane: dict[int, list[list[bool]]]
    num_pairs: int


class RerankerTask:
    """Steps of the reranker over one training set."""

    def __init__(
        self,
        reranker: Reranker,
        data: TrainingSet,
        settings: RerankerTrainSettings,
        *,
        plan: BatchPlan,
        lanes: Lanes,
        max_tokens: int,
        seed: int,
    ) -> None:
        self.model = reranker
        self._data = data
        self._settings = settings
        self._plan = plan
        self._lanes = lanes
        self._max_tokens = max_tokens
        self._seed = seed

    def prepare(self, step: int) -> PreparedPairs:
        """The pairs of a step: a pure function of it."""
        rows, epoch = self._plan.rows(step)
        items = [
            self._draw(self._data.item(int(row), visit=epoch), row=int(row), visit=epoch) for row in rows
        ]
        costs = [token_cost(item.query) + sum(map(token_cost, item.others)) for item in items]
        dealt = deal(costs, self._lanes.count)
        trees, answers = {}, {}
        for lane in self._lanes.mine:
            mine = [items[index] for index in dealt[lane]]
            answers[lane] = [[True] + [False] * len(item.others) for item in mine]
            trees[lane] = [
                self.model.builder.build(item.query, [item.positive, *item.others], verdicts)
                for item, verdicts in zip(mine, answers[lane], strict=True)
            ]
        return PreparedPairs(
            qids=[item.query.qid for item in items],
            trees_by_lane=trees,
            answers_by_lane=answers,
            num_pairs=sum(1 + len(item.others) for item in items),
        )

    def _draw(self, item: TrainingItem, *, row: int, visit: int) -> TrainingItem:
        rng = np.random.default_rng([self._seed, row, visit])
        num = min(self._settings.negatives_per_positive, len(item.others))
        chosen = rng.choice(len(item.others), size=num, replace=False) if num else []
        return TrainingItem(
            query=item.query,
            positive=item.positive,
            others=tuple(item.others[int(index)] for index in chosen),
            scores=None,
            relevant=item.relevant,
        )

    def samples(self, prepared: PreparedPairs) -> list[str]:
        """Ids to name in an error."""
        return prepared.qids

    def backward(self, prepared: PreparedPairs, *, seed: int) -> dict[str, float]:
        """Leave the gradient of the mean over all pairs in `.grad`; return figures for the log."""
        figures = {lane: torch.zeros(2) for lane in self._lanes.mine}

        def backward(lane: int) -> None:
            trees, answers = prepared.trees_by_lane[lane], prepared.answers_by_lane[lane]
            for number, chunk in enumerate(
                micro_batches([tree.num_tokens for tree in trees], self._max_tokens)
            ):
                torch.manual_seed(hash((seed, lane, number)) % 2**63)
                loss, right = self._chunk([trees[i] for i in chunk], [answers[i] for i in chunk])
                (loss / prepared.num_pairs).backward()
                figures[lane] += torch.tensor([loss.item(), right])

        sum_gradients(self.model, backward, lanes=self._lanes)
        loss, right = (
            self._lanes.sum([figures[lane] for lane in self._lanes.mine]) / prepared.num_pairs
        ).tolist()
        return {
            "loss": loss,
            "accuracy": right,
            "num_queries": len(prepared.qids),
            "num_pairs": prepared.num_pairs,
        }

    def _chunk(self, trees: list[Tree], answers: list[list[bool]]) -> tuple[torch.Tensor, float]:
        """Summed loss over the pairs of some trees, and how many it gets right.

        A pair's loss is the mean over its answer's tokens.
        """
        hidden_TD = self.model.hidden(trees)
        asking, target, weight, decisive, verdicts = [], [], [], [], []
        start = 0
        for tree, tree_answers in zip(trees, answers, strict=True):
            ends = [*tree.leaf.searchsorted(np.arange(2, len(tree_answers) + 1)), tree.num_tokens]
            for first, end, answer in zip(tree.decisive, ends, tree_answers, strict=True):
                decisive.append(start + int(first))
                verdicts.append(answer)
                span = range(int(first), int(end) - 1)
                asking += [start + place for place in span]
                target += [int(tree.ids[place + 1]) for place in span]
                scale = self._settings.positive_weight if answer else 1.0
                weight += [scale / len(span)] * len(span)
            start += tree.num_tokens
        device = hidden_TD.device
        head = self.model.model.get_output_embeddings()
        logits_TV = head(hidden_TD[torch.tensor(asking, device=device)])
        loss_T = answer_loss(logits_TV, torch.tensor(target, device=device))
        ids = self.model.builder.answer_ids
        with torch.no_grad():
            yes_no = (
                hidden_TD[torch.tensor(decisive, device=device)].float()
                @ self.model.head_rows([ids[True], ids[False]]).float().T
            )
            says_yes = yes_no[:, 0] > yes_no[:, 1]
        right = float((says_yes == torch.tensor(verdicts, device=device)).sum())
        return (loss_T * torch.tensor(weight, device=device)).sum(), right

    def after_step(self) -> None:
        """Nothing to bring back."""
