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

_TILE_ROWS, _TILE_COLUMNS = 1024, 2048
"""8 MB of float32 logits at a time: they stay in a CPU's last cache, and fill a GPU."""
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
    device, num_rows = row_RD.device, len(row_RD)
    lse, row_gradients, losses, temperature_gradients = {}, {}, [], []
    for lane in lanes.mine:
        own_ID = row_RD[_index(rows[lane], device)]
        target_ID = column_CD[_index(target_R[rows[lane]], device)]
        lse_I, expected_ID = _pass_rows(own_ID, column_CD, scale, _Ignored.of(ignore, rows[lane]))
        distance_ID = expected_ID - target_ID
        losses.append((lse_I - (own_ID * target_ID).sum(1) * scale).sum() / num_rows)
        temperature_gradients.append(-(own_ID * distance_ID).sum() * scale**2 / num_rows)
        row_gradients[lane] = distance_ID * (scale / num_rows)
        lse[lane] = lse_I[:, None]
    lse_R = lanes.gather(lse, rows)[:, 0]
    column_gradients = {}
    for lane in lanes.mine:
        own = columns[lane]
        gradient_JD = _pass_columns(
            row_RD,
            column_CD[_index(own, device)],
            lse_R,
            scale,
            _Ignored.of((ignore[1], ignore[0]), own),
        )
        asked = np.flatnonzero(np.isin(target_R, own))
        place = np.searchsorted(own, target_R[asked])
        gradient_JD.index_add_(0, _index(place, device), row_RD[_index(asked, device)], alpha=-1)
        column_gradients[lane] = gradient_JD * (scale / num_rows)
    both = lanes.sum([torch.stack(pair) for pair in zip(losses, temperature_gradients, strict=True)])
    return SlabGradient(loss=both[0], temperature=both[1], rows=row_gradients, columns=column_gradients)


def _pass_rows(
    own_ID: Tensor, column_CD: Tensor, scale: Tensor, ignored: "_Ignored"
) -> tuple[Tensor, Tensor]:
    """Of each own row the log-sum-exp (I,), and the columns' mean under its softmax (I, D)."""
    lse_I = own_ID.new_empty(len(own_ID))
    expected_ID = torch.empty_like(own_ID)
    for top in range(0, len(own_ID), _TILE_ROWS):
        tile_ID = own_ID[top : top + _TILE_ROWS] * scale
        highest_I = tile_ID.new_full((len(tile_ID),), _NO_LOGIT)
        mass_I = torch.zeros_like(highest_I)
        sum_ID = torch.zeros_like(tile_ID)
        for left in range(0, len(column_CD), _TILE_COLUMNS):
            columns_CD = column_CD[left : left + _TILE_COLUMNS]
            logit_IC = tile_ID @ columns_CD.T
            ignored.fill(logit_IC, top, left, _NO_LOGIT)
            new_I = torch.maximum(highest_I, logit_IC.amax(1))
            shrink_I = (highest_I - new_I).exp_()
            share_IC = logit_IC.sub_(new_I[:, None]).exp_()
            mass_I.mul_(shrink_I).add_(share_IC.sum(1))
            sum_ID.mul_(shrink_I[:, None]).addmm_(share_IC, columns_CD)
            highest_I = new_I
        lse_I[top : top + _TILE_ROWS] = highest_I + mass_I.log()
        expected_ID[top : top + _TILE_ROWS] = sum_ID / mass_I[:, None]
    return lse_I, expected_ID


def _pass_columns(
    row_RD: Tensor, own_JD: Tensor, lse_R: Tensor, scale: Tensor, ignored: "_Ignored"
) -> Tensor:
    """Of each own column the sum of the rows, each by its probability of choosing it: (J, D)."""
    sum_JD = torch.zeros_like(own_JD)
    for left in range(0, len(own_JD), _TILE_ROWS):
        tile_JD = own_JD[left : left + _TILE_ROWS] * scale
        into_JD = sum_JD[left : left + _TILE_ROWS]
        for top in range(0, len(row_RD), _TILE_COLUMNS):
            rows_RD = row_RD[top : top + _TILE_COLUMNS]
            logit_JR = tile_JD @ rows_RD.T
            ignored.fill(logit_JR, left, top, _NO_LOGIT)
            into_JD.addmm_(logit_JR.sub_(lse_R[top : top + _TILE_COLUMNS]).exp_(), rows_RD)
    return sum_JD


@dataclass(frozen=True, slots=True)
class _Ignored:
    """Pairs that do not count, tile by tile: `own` places within a lane's own, `other` among all."""

    own: np.ndarray
    other: np.ndarray
    spans: Mapping[tuple[int, int], slice]

    @staticmethod
    def of(pairs: tuple[np.ndarray, np.ndarray], mine: np.ndarray) -> "_Ignored":
        """Those whose first half is one of `mine`."""
        chosen = np.isin(pairs[0], mine)
        own, other = np.searchsorted(mine, pairs[0][chosen]), pairs[1][chosen]
        tile = (own // _TILE_ROWS) << 32 | (other // _TILE_COLUMNS)
        order = np.argsort(tile, kind="stable")
        tiles, starts = np.unique(tile[order], return_index=True)
        spans = zip(tiles.tolist(), starts.tolist(), [*starts[1:].tolist(), len(own)], strict=False)
        return _Ignored(
            own=own[order],
            other=other[order],
            spans={
                ((tile >> 32) * _TILE_ROWS, (tile & 0xFFFFFFFF) * _TILE_COLUMNS): slice(start, end)
                for tile, start, end in spans
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
