"""InfoNCE over the global batch, in tiles: each lane computes its own rows and its own columns.

The whole matrix of logits is never held, and no gradient of another lane's embeddings is computed or sent. A
lane first passes its own rows over all columns, keeping of each row the log-sum-exp and the expected column
(as attention does); then the log-sum-exps of all rows are exchanged, and the lane passes its own columns over
all rows. Memory grows with the embeddings, not with the square of the batch. Source of the two-sided split:
Cheng et al. 2024, arXiv:2410.17243; of the running softmax: Milakov and Gimelshein 2018, arXiv:1805.02867.

R rows (who asks), C columns (who answers), D width; I own rows and J own columns of a lane.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from umarvel_ray.train.gather import Lanes

_TILES = {"cpu": (256, 1024), "cuda": (2048, 8192)}
"""Own ones and others of a tile of logits: 1 MB stays in a core's cache, 64 MB fill a GPU."""
_NO_LOGIT = -1e30
"""Of a pair that does not count; finite, so that a tile without any other makes no NaN."""


@dataclass(frozen=True, slots=True)
class SlabGradient:
    """What one direction of the loss gives.

    Attributes:
        loss: Mean over R, a scalar.
        temperature: dloss/dτ, a scalar.
        rows: For each lane computed here, dloss/d(own rows), (I, D).
        columns: For each lane computed here, dloss/d(own columns), (J, D).
    """

    loss: Tensor
    temperature: Tensor
    rows: dict[int, Tensor]
    columns: dict[int, Tensor]


def info_nce(
    row_RD: Tensor,
    column_CD: Tensor,
    *,
    target_R: np.ndarray,
    ignore: tuple[np.ndarray, np.ndarray],
    temperature: Tensor,
    rows: Sequence[np.ndarray],
    columns: Sequence[np.ndarray],
    lanes: Lanes,
) -> SlabGradient:
    """Cross-entropy of each row's target column against all columns, with its true gradient.

    Args:
        row_RD: Unit-norm embeddings of all lanes.
        column_CD: Unit-norm embeddings of all lanes.
        target_R: int64, the column of each row's target.
        ignore: Rows and columns, int64 each, of the pairs that do not count; never a row with its target.
        temperature: Scalar τ > 0.
        rows: For each of all lanes, its own rows, ascending; together all rows, once each.
        columns: For each of all lanes, its own columns, ascending; together all columns, once each.
        lanes: Who computes what.

    Returns:
        Loss and gradients in float32, whatever comes in; in nats.

    Source: van den Oord et al. 2018, eq. 4, arXiv:1807.03748.
    """
    row_RD, column_CD = row_RD.float(), column_CD.float()
    scale = 1 / temperature.float()
    tile = _TILES.get(row_RD.device.type, _TILES["cuda"])
    lse, row_gradients, sums = {}, {}, []
    for lane in lanes.mine:
        ignored = _Ignored.of(ignore, rows[lane], tile)
        lse[lane], row_gradients[lane], both = _pass_rows(
            row_RD, column_CD, rows[lane], target_R, scale, ignored, tile
        )
        sums.append(both)
    lse_R = lanes.gather(lse, rows)[:, 0]
    column_gradients = {}
    for lane in lanes.mine:
        ignored = _Ignored.of((ignore[1], ignore[0]), columns[lane], tile)
        column_gradients[lane] = _pass_columns(
            row_RD, column_CD, columns[lane], target_R, lse_R, scale, ignored, tile
        )
    loss, of_temperature = lanes.sum(sums) / len(row_RD)
    return SlabGradient(loss=loss, temperature=of_temperature, rows=row_gradients, columns=column_gradients)


def _pass_rows(
    row_RD: Tensor,
    column_CD: Tensor,
    own: np.ndarray,
    target_R: np.ndarray,
    scale: Tensor,
    ignored: "_Ignored",
    tile: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Of own rows the log-sum-exp (I, 1) and the gradient (I, D), and the sums of losses and of dlosses/dτ.

    A row is drawn from its target towards the mean of the columns under its softmax.
    """
    device, num_rows = row_RD.device, len(row_RD)
    lse_I1 = row_RD.new_empty(len(own), 1)
    gradient_ID = row_RD.new_empty(len(own), row_RD.shape[1])
    sums = row_RD.new_zeros(2)
    for top in range(0, len(own), tile[0]):
        part = own[top : top + tile[0]]
        own_ID = row_RD[_index(part, device)]
        scaled_ID = own_ID * scale
        sum_ID = gradient_ID[top : top + tile[0]].zero_()
        highest_I = own_ID.new_full((len(part),), _NO_LOGIT)
        mass_I = torch.zeros_like(highest_I)
        for left in range(0, len(column_CD), tile[1]):
            tile_CD = column_CD[left : left + tile[1]]
            logit_IC = scaled_ID @ tile_CD.T
            ignored.fill(logit_IC, top, left, _NO_LOGIT)
            new_I = torch.maximum(highest_I, logit_IC.amax(1))
            shrink_I = (highest_I - new_I).exp_()
            share_IC = logit_IC.sub_(new_I[:, None]).exp_()
            mass_I.mul_(shrink_I).add_(share_IC.sum(1))
            sum_ID.mul_(shrink_I[:, None]).addmm_(share_IC, tile_CD)
            highest_I = new_I
        lse_I = highest_I + mass_I.log_()
        lse_I1[top : top + tile[0], 0] = lse_I
        target_ID = column_CD[_index(target_R[part], device)]
        sum_ID.mul_((highest_I - lse_I).exp_()[:, None]).sub_(target_ID)
        sums[0] += (lse_I - (scaled_ID * target_ID).sum(1)).sum()
        sums[1] -= (scaled_ID.mul_(sum_ID)).sum() * scale
    return lse_I1, gradient_ID.mul_(scale / num_rows), sums


def _pass_columns(
    row_RD: Tensor,
    column_CD: Tensor,
    own: np.ndarray,
    target_R: np.ndarray,
    lse_R: Tensor,
    scale: Tensor,
    ignored: "_Ignored",
    tile: tuple[int, int],
) -> Tensor:
    """The gradient of own columns (J, D): the rows that aim at one, less the rows that choose it."""
    device, num_rows = row_RD.device, len(row_RD)
    gradient_JD = row_RD.new_zeros(len(own), row_RD.shape[1])
    for left in range(0, len(own), tile[0]):
        scaled_JD = column_CD[_index(own[left : left + tile[0]], device)] * scale
        sum_JD = gradient_JD[left : left + tile[0]]
        for top in range(0, num_rows, tile[1]):
            tile_RD = row_RD[top : top + tile[1]]
            logit_JR = scaled_JD @ tile_RD.T
            ignored.fill(logit_JR, left, top, _NO_LOGIT)
            sum_JD.addmm_(logit_JR.sub_(lse_R[top : top + tile[1]]).exp_(), tile_RD)
    asking = np.flatnonzero(np.isin(target_R, own))
    place = np.searchsorted(own, target_R[asking])
    for start in range(0, len(asking), tile[0]):
        span = slice(start, start + tile[0])
        asking_RD = row_RD[_index(asking[span], device)]
        gradient_JD.index_add_(0, _index(place[span], device), asking_RD, alpha=-1)
    return gradient_JD.mul_(scale / num_rows)


@dataclass(frozen=True, slots=True)
class _Ignored:
    """Pairs that do not count, tile by tile: `own` places within a lane's own, `other` among all."""

    own: np.ndarray
    other: np.ndarray
    spans: Mapping[tuple[int, int], slice]

    @staticmethod
    def of(pairs: tuple[np.ndarray, np.ndarray], mine: np.ndarray, tile: tuple[int, int]) -> "_Ignored":
        """Those whose first half is one of `mine`."""
        chosen = np.isin(pairs[0], mine)
        own, other = np.searchsorted(mine, pairs[0][chosen]), pairs[1][chosen]
        number = (own // tile[0]) << 32 | (other // tile[1])
        order = np.argsort(number, kind="stable")
        numbers, starts = np.unique(number[order], return_index=True)
        spans = zip(numbers.tolist(), starts.tolist(), [*starts[1:].tolist(), len(own)], strict=False)
        return _Ignored(
            own=own[order],
            other=other[order],
            spans={
                ((number >> 32) * tile[0], (number & 0xFFFFFFFF) * tile[1]): slice(start, end)
                for number, start, end in spans
            },
        )

    def fill(self, tile: Tensor, own_start: int, other_start: int, value: float) -> None:
        """Set the logits of this tile's ignored pairs."""
        if (part := self.spans.get((own_start, other_start))) is not None:
            tile[
                _index(self.own[part] - own_start, tile.device),
                _index(self.other[part] - other_start, tile.device),
            ] = value


def _index(places: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.asarray(places, dtype=np.int64)).to(device)
