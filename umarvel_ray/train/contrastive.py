"""What one step of the embedder does: prepare a global batch, leave its gradient. Letters as in `losses`."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from umarvel_ray.data.batches import BatchPlan, ContrastiveBatch, TrainingSet, build_batch, deal, token_cost
from umarvel_ray.data.records import Query
from umarvel_ray.model.encoder import Encoder
from umarvel_ray.model.inputs import Item
from umarvel_ray.train.gather import Lanes
from umarvel_ray.train.grad_cache import cached_backward
from umarvel_ray.train.losses import info_nce, list_distillation
from umarvel_ray.train.settings import ContrastiveSettings


@dataclass(frozen=True, slots=True)
class PreparedBatch:
    """A global batch with the items of the lanes computed here ready to be packed."""

    batch: ContrastiveBatch
    indices: list[np.ndarray]
    items_by_lane: dict[int, list[Item]]


class ContrastiveTask:
    """Steps of the embedder over one training set."""

    def __init__(
        self,
        encoder: Encoder,
        data: TrainingSet,
        settings: ContrastiveSettings,
        *,
        plan: BatchPlan,
        lanes: Lanes,
        max_tokens: int,
    ) -> None:
        self.model = encoder
        self._data = data
        self._settings = settings
        self._plan = plan
        self._lanes = lanes
        self._max_tokens = max_tokens

    def prepare(self, step: int) -> PreparedBatch:
        """The global batch of a step: a pure function of it."""
        rows, epoch = self._plan.rows(step)
        batch = build_batch(self._data, rows, visit=epoch)
        indices = deal([token_cost(record) for record in batch.records], self._lanes.count)
        build = self.model.builder.build
        return PreparedBatch(
            batch=batch,
            indices=indices,
            items_by_lane={
                lane: [build(batch.records[i]) for i in indices[lane]] for lane in self._lanes.mine
            },
        )

    def samples(self, prepared: PreparedBatch) -> list[str]:
        """Ids to name in an error."""
        return [record.qid for record in prepared.batch.records if isinstance(record, Query)]

    def backward(self, prepared: PreparedBatch, *, seed: int) -> dict[str, float]:
        """Leave the gradient of the global batch's mean loss in `.grad`; return figures for the log."""
        batch = prepared.batch
        loss = cached_backward(
            self.model,
            prepared.items_by_lane,
            prepared.indices,
            lambda embedding_ND, temperature, lane: self._lane_loss(batch, embedding_ND, temperature, lane),
            lanes=self._lanes,
            max_tokens=self._max_tokens,
            seed=seed,
        )
        return {
            "loss": loss.item(),
            "temperature": self.model.temperature.item(),
            "num_queries": batch.num_queries,
            "num_candidates": batch.num_candidates,
            "false_negatives": int(batch.false_QC.sum()),
        }

    def after_step(self) -> None:
        """Keep τ positive: an optimizer step may not carry it through zero."""
        with torch.no_grad():
            self.model.temperature.clamp_(min=1e-3)

    def _lane_loss(
        self, batch: ContrastiveBatch, embedding_ND: Tensor, temperature: Tensor, lane: int
    ) -> Tensor:
        """This lane's queries' part of the mean over the global batch."""
        settings, num_queries = self._settings, batch.num_queries
        device = embedding_ND.device
        rows = np.arange(lane, num_queries, self._lanes.count)
        query_QD, candidate_CD = embedding_ND[:num_queries], embedding_ND[num_queries:]
        mine_QD = query_QD[torch.from_numpy(rows).to(device)]
        if settings.kind == "distillation":
            assert batch.teacher_QK is not None
            teacher_QK = torch.from_numpy(batch.teacher_QK[rows]).to(device)
            list_QK = torch.from_numpy(batch.others_QK[rows].clip(min=0)).to(device)
            teacher_temperature = (
                temperature
                if settings.teacher_temperature is None
                else torch.tensor(settings.teacher_temperature)
            )
            loss_Q = list_distillation(
                mine_QD,
                candidate_CD[list_QK],
                teacher_QK=teacher_QK,
                temperature=temperature,
                teacher_temperature=teacher_temperature,
            )
            return loss_Q.sum() / num_queries
        ignore_QC = batch.false_QC if settings.mask_false_negatives else np.zeros_like(batch.false_QC)
        if settings.negatives == "own":
            ignore_QC = ignore_QC | ~batch.own_columns()
        positive_Q = torch.from_numpy(batch.positive_Q).to(device)
        loss = info_nce(
            mine_QD,
            candidate_CD,
            positive_Q=positive_Q[rows],
            temperature=temperature,
            ignore_QC=torch.from_numpy(ignore_QC[rows]).to(device),
        ).sum()
        if settings.candidate_to_query:
            # Row p: the positive of query p looks for p among all queries; others it answers do not count.
            answers_QQ = ignore_QC[:, batch.positive_Q].T | (
                batch.positive_Q[:, None] == batch.positive_Q[None, :]
            )
            np.fill_diagonal(answers_QQ, False)
            loss_back = info_nce(
                candidate_CD[positive_Q[rows]],
                query_QD,
                positive_Q=torch.from_numpy(rows).to(device),
                temperature=temperature,
                ignore_QC=torch.from_numpy(answers_QQ[rows]).to(device),
            ).sum()
            loss = loss + settings.candidate_to_query * loss_back
        return loss / num_queries
