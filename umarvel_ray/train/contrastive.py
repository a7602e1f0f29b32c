"""What one step of the embedder does: prepare a global batch, leave its gradient. Letters as in `losses`.

N items of the global batch: its Q queries, then its C candidates.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from umarvel_ray.data.batches import (
    BatchPlan,
    ContrastiveBatch,
    TrainingSet,
    build_batch,
    deal,
    filler_record,
    token_cost,
)
from umarvel_ray.data.records import Query
from umarvel_ray.model.encoder import Encoder
from umarvel_ray.model.inputs import Item
from umarvel_ray.train.chunk import find_max_tokens
from umarvel_ray.train.grad_cache import LossGradient, cached_backward, embed_batch
from umarvel_ray.train.loaders import Loaders
from umarvel_ray.train.losses import list_cross_entropy, list_distillation
from umarvel_ray.train.settings import ContrastiveSettings
from umarvel_ray.train.slab import info_nce
from umarvel_ray.train.strategy import Replicated


@dataclass(frozen=True, slots=True)
class PreparedBatch:
    """A global batch with the items of the lanes computed here ready to be packed."""

    batch: ContrastiveBatch
    indices: list[np.ndarray]
    items_by_lane: dict[int, list[Item]]
    filler: Item | None
    odd: list[int]
    """Filled in when the loss is not finite: the records whose embedding is not either."""


_LOOKED_AT = 64
"""Records from which the size of pictures is guessed; the same on all workers and at each start."""


def _vision_tokens(item: Item) -> int:
    return sum(int(np.count_nonzero(item.ids == visual.token)) for visual in item.visuals)


class ContrastiveTask:
    """Steps of the embedder over one training set."""

    def __init__(
        self,
        encoder: Encoder,
        data: TrainingSet,
        settings: ContrastiveSettings,
        *,
        plan: BatchPlan,
        strategy: Replicated,
        max_tokens: int,
        num_loaders: int = 0,
    ) -> None:
        self.model = encoder
        self._data = data
        self._settings = settings
        self._plan = plan
        self._strategy = strategy
        self._lanes = strategy.lanes
        self._max_tokens = max_tokens
        self._loaders = Loaders(encoder.builder, num_loaders)
        self._picture_tokens = self._typical_picture()

    def prepare(self, step: int) -> PreparedBatch:
        """The global batch of a step: a pure function of it."""
        return self._prepare(*self._plan.rows(step))

    def _prepare(self, rows: np.ndarray, epoch: int) -> PreparedBatch:
        masked = self._settings.mask_false_negatives
        batch = build_batch(self._data, rows, visit=epoch, mask_false_negatives=masked)
        costs = [token_cost(record, image_tokens=self._picture_tokens) for record in batch.records]
        indices = deal(costs, self._lanes.count)
        build = self._loaders.build
        filler = build([(filler_record(batch.records),)])[0] if self._strategy.lockstep else None
        items = {lane: build([(batch.records[i],) for i in indices[lane]]) for lane in self._lanes.mine}
        return PreparedBatch(batch=batch, indices=indices, items_by_lane=items, filler=filler, odd=[])

    def _typical_picture(self) -> int:
        """Mean tokens of a picture among the first queries and positives: what `deal` takes each to have."""
        rows, epoch = self._plan.rows(0)
        items = [self._data.item(int(row), visit=epoch) for row in rows[:_LOOKED_AT]]
        shown = [r for item in items for r in (item.query, item.positive) if r.img_path]
        if not shown:
            return 0
        built = [self.model.builder.build(record) for record in shown[:_LOOKED_AT]]
        tokens = [_vision_tokens(item) for item in built]
        return round(sum(tokens) / len(tokens))

    def find_max_tokens(self) -> None:
        """Take the largest chunk that fits the device."""
        items = [item for own in self.prepare(0).items_by_lane.values() for item in own]
        self._max_tokens = find_max_tokens(self.model.train(), items, self._strategy)

    def samples(self, prepared: PreparedBatch) -> list[str]:
        """Ids to name in an error: of the records whose embedding is not finite, or of all queries."""
        chosen = [prepared.batch.records[index] for index in prepared.odd] or prepared.batch.records
        ids = [record.qid if isinstance(record, Query) else record.did for record in chosen]
        return ids if prepared.odd else ids[: prepared.batch.num_queries]

    def backward(self, prepared: PreparedBatch, *, seed: int) -> dict[str, float]:
        """Leave the gradient of the global batch's mean loss; return figures for the log."""
        batch = prepared.batch
        of_lists = self._settings.over_own_lists
        batch_loss = self._loss_of_lists if of_lists else self._loss_of_batch
        seen: list[Tensor] = []

        def loss_of(embedding_ND: Tensor, temperature: Tensor) -> LossGradient:
            seen.append(embedding_ND)
            return batch_loss(batch, embedding_ND, temperature, prepared.indices)

        loss = cached_backward(
            self.model,
            prepared.items_by_lane,
            prepared.indices,
            loss_of,
            strategy=self._strategy,
            max_tokens=self._max_tokens,
            seed=seed,
            filler=prepared.filler,
        ).item()
        if not math.isfinite(loss):
            prepared.odd.extend(torch.nonzero(~seen[0].isfinite().all(1)).flatten().tolist())
        return {
            "loss": loss,
            "temperature": self.model.temperature.item(),
            "num_queries": batch.num_queries,
            "num_candidates": batch.num_candidates,
            "negatives_per_query": round(batch.negatives_per_query(own_lists=of_lists), 2),
            "false_negatives": len(batch.false_pairs[0]),
        }

    def validate(self) -> dict[str, float]:
        """Held-out queries against the candidates of all of them: loss, hits, and as score the MRR."""
        prepared = self._prepare(self._plan.held_out, 0)
        batch, num_queries = prepared.batch, prepared.batch.num_queries
        self.model.eval()
        embedding_ND = embed_batch(
            self.model,
            prepared.items_by_lane,
            prepared.indices,
            strategy=self._strategy,
            max_tokens=self._max_tokens,
            filler=prepared.filler,
        )
        self.model.train()
        cosine_QC = embedding_ND[:num_queries] @ embedding_ND[num_queries:].T
        logit_QC = cosine_QC / self.model.temperature.detach()
        logit_QC[batch.false_pairs] = float("-inf")
        own_Q1 = torch.from_numpy(batch.positive_Q)[:, None].to(logit_QC.device)
        positive_Q1 = logit_QC.gather(1, own_Q1)
        # Ties count against the query: a collapsed encoder ranks its positive last.
        rank_Q = (logit_QC >= positive_Q1).sum(1).float()
        return {
            "loss": (logit_QC.logsumexp(1) - positive_Q1[:, 0]).mean().item(),
            "hit@1": (rank_Q <= 1).float().mean().item(),
            "hit@5": (rank_Q <= 5).float().mean().item(),
            "score": (1 / rank_Q).mean().item(),
        }

    def close(self) -> None:
        """End what prepared the batches."""
        self._loaders.close()

    def after_step(self) -> None:
        """Keep τ positive: an optimizer step may not carry it through zero."""
        with torch.no_grad():
            self.model.temperature.clamp_(min=1e-3)

    def _loss_of_batch(
        self, batch: ContrastiveBatch, embedding_ND: Tensor, temperature: Tensor, indices: list[np.ndarray]
    ) -> LossGradient:
        """InfoNCE over all candidates of the global batch, and the way back from each positive."""
        num_queries, weight = batch.num_queries, self._settings.candidate_to_query
        query_QD, candidate_CD = embedding_ND[:num_queries], embedding_ND[num_queries:]
        queries = [own[own < num_queries] for own in indices]
        candidates = [own[own >= num_queries] - num_queries for own in indices]
        there = info_nce(
            query_QD,
            candidate_CD,
            target_R=batch.positive_Q,
            ignore=batch.false_pairs,
            temperature=temperature,
            rows=queries,
            columns=candidates,
            lanes=self._lanes,
        )
        if not weight:
            items = {lane: torch.cat([there.rows[lane], there.columns[lane]]) for lane in self._lanes.mine}
            return LossGradient(there.loss, there.temperature, items)
        # Row p: the positive of query p looks for p among all queries. Its owner embedded the positive.
        positive_Q = batch.positive_Q
        asking = [np.flatnonzero(np.isin(positive_Q, own)) for own in candidates]
        back = info_nce(
            candidate_CD[torch.from_numpy(positive_Q).to(candidate_CD.device)],
            query_QD,
            target_R=np.arange(num_queries),
            ignore=batch.answered_pairs(),
            temperature=temperature,
            rows=asking,
            columns=queries,
            lanes=self._lanes,
        )
        items = {}
        for lane in self._lanes.mine:
            place = torch.from_numpy(np.searchsorted(candidates[lane], positive_Q[asking[lane]]))
            of_candidates = there.columns[lane].index_add(
                0, place.to(embedding_ND.device), back.rows[lane], alpha=weight
            )
            items[lane] = torch.cat([there.rows[lane] + weight * back.columns[lane], of_candidates])
        return LossGradient(
            there.loss + weight * back.loss, there.temperature + weight * back.temperature, items
        )

    def _loss_of_lists(
        self, batch: ContrastiveBatch, embedding_ND: Tensor, temperature: Tensor, indices: list[np.ndarray]
    ) -> LossGradient:
        """Each query against its own list alone: lists are short, so gradients of all items are exchanged."""
        losses, of_items, of_temperature = [], [], []
        for lane in self._lanes.mine:
            leaf_ND = embedding_ND.detach().requires_grad_()
            tau = temperature.detach().clone().requires_grad_()
            rows = np.arange(lane, batch.num_queries, self._lanes.count)
            loss = self._loss_of_rows(batch, leaf_ND, tau, rows).sum() / batch.num_queries
            gradient_ND, of_tau = torch.autograd.grad(loss, (leaf_ND, tau))
            losses.append(loss.detach())
            of_items.append(gradient_ND)
            of_temperature.append(of_tau)
        gradient_ND = self._lanes.sum(of_items)
        both = self._lanes.sum([torch.stack(pair) for pair in zip(losses, of_temperature, strict=True)])
        own = {lane: torch.from_numpy(indices[lane]).to(gradient_ND.device) for lane in self._lanes.mine}
        return LossGradient(both[0], both[1], {lane: gradient_ND[index] for lane, index in own.items()})

    def _loss_of_rows(
        self, batch: ContrastiveBatch, embedding_ND: Tensor, temperature: Tensor, rows: np.ndarray
    ) -> Tensor:
        """Of some queries, each's loss over its list."""
        device = embedding_ND.device
        query_QD = embedding_ND[torch.from_numpy(rows).to(device)]
        candidate_CD = embedding_ND[batch.num_queries :]
        if self._settings.kind == "info_nce":
            columns_QG, counts_QG = batch.listed()
            return list_cross_entropy(
                query_QD,
                candidate_CD[torch.from_numpy(columns_QG[rows]).to(device)],
                counts_QG=torch.from_numpy(counts_QG[rows]).to(device),
                temperature=temperature,
            )
        assert batch.teacher_QK is not None
        fixed = self._settings.teacher_temperature
        return list_distillation(
            query_QD,
            candidate_CD[torch.from_numpy(batch.others_QK[rows].clip(min=0)).to(device)],
            teacher_QK=torch.from_numpy(batch.teacher_QK[rows]).to(device),
            temperature=temperature,
            teacher_temperature=temperature if fixed is None else torch.tensor(fixed),
        )
