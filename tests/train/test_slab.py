"""InfoNCE in tiles, lane by lane, against the whole matrix in float64 and its automatic gradient."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from umarvel_ray.train import slab
from umarvel_ray.train.gather import Lanes
from umarvel_ray.train.slab import SlabGradient, info_nce


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def case(
    num_rows: int, num_columns: int, share: float = 0.2
) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    """Rows, columns, targets (some shared), and which pairs do not count."""
    rng = np.random.default_rng(num_rows)
    target_R = rng.integers(num_columns, size=num_rows)
    ignore_RC = rng.random((num_rows, num_columns)) < share
    ignore_RC[1] = True  # one row has its target alone
    ignore_RC[np.arange(num_rows), target_R] = False
    return unit(num_rows, 6, seed=0), unit(num_columns, 6, seed=1), target_R, ignore_RC


def dealt(number: int, num_lanes: int, seed: int) -> list[np.ndarray]:
    """Unequal shares; with many lanes, some have nothing."""
    lane = np.random.default_rng(seed).integers(num_lanes, size=number)
    return [np.flatnonzero(lane == own) for own in range(num_lanes)]


def run(
    row_RD, column_CD, target_R, ignore_RC, *, tau: float, num_lanes: int
) -> tuple[SlabGradient, Tensor, Tensor]:
    """The gradient, and that of all rows and of all columns put together again."""
    rows, columns = dealt(len(row_RD), num_lanes, 1), dealt(len(column_CD), num_lanes, 2)
    found = info_nce(
        row_RD,
        column_CD,
        target_R=target_R,
        ignore=np.nonzero(ignore_RC),
        temperature=torch.tensor(tau),
        rows=rows,
        columns=columns,
        lanes=Lanes(num_lanes),
    )
    of_rows, of_columns = torch.zeros_like(row_RD).float(), torch.zeros_like(column_CD).float()
    for lane in range(num_lanes):
        of_rows[rows[lane]] = found.rows[lane]
        of_columns[columns[lane]] = found.columns[lane]
    return found, of_rows, of_columns


def whole(row_RD, column_CD, target_R, ignore_RC, *, tau: float) -> tuple[Tensor, ...]:
    """Loss and gradients of rows, columns and temperature, by the definition."""
    leaves = [row_RD.double().requires_grad_(), column_CD.double().requires_grad_()]
    leaves.append(torch.tensor(tau, dtype=torch.float64, requires_grad=True))
    logits_RC = (leaves[0] @ leaves[1].T / leaves[2]).masked_fill(torch.from_numpy(ignore_RC), -torch.inf)
    loss = F.cross_entropy(logits_RC, torch.from_numpy(target_R))
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("num_lanes", [1, 2, 5, 20])
@pytest.mark.parametrize("tiles", [(3, 4), (1, 1), (256, 1024)])
@pytest.mark.parametrize("tau", [0.02, 1.0])
def test_tiles_and_lanes_give_the_gradient_of_the_whole_matrix(monkeypatch, num_lanes, tiles, tau):
    """float32 against float64; the last tiles are short, and some hold nothing that counts."""
    monkeypatch.setitem(slab._TILES, "cpu", tiles)
    values = case(11, 17, share=0.5)
    found, of_rows, of_columns = run(*values, tau=tau, num_lanes=num_lanes)
    loss, row_gradient, column_gradient, of_temperature = whole(*values, tau=tau)
    torch.testing.assert_close(found.loss.double(), loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.temperature.double(), of_temperature, rtol=1e-4, atol=1e-5)
    for mine, theirs in ((of_rows, row_gradient), (of_columns, column_gradient)):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=2e-6 / tau)


def test_an_ignored_column_gets_no_gradient():
    row_RD, column_CD, target_R, ignore_RC = case(5, 7, share=0.0)
    target_R[:] = [0, 1, 2, 0, 1]
    ignore_RC[:] = False
    ignore_RC[:, 6] = True
    _, _, of_columns = run(row_RD, column_CD, target_R, ignore_RC, tau=0.1, num_lanes=2)
    assert (of_columns[6] == 0).all() and (of_columns[:6].abs().sum(1) > 0).all()


def test_the_gradient_of_tau():
    """Central differences of the float64 definition."""
    values = case(5, 7)
    found, _, _ = run(*values, tau=0.1, num_lanes=1)
    above, below = (whole(*values, tau=0.1 + step)[0] for step in (1e-5, -1e-5))
    assert found.temperature.item() == pytest.approx(float(above - below) / 2e-5, rel=1e-4)


def test_half_precision_is_computed_in_float32():
    row_RD, column_CD, *rest = case(5, 7)
    row_RD, column_CD = row_RD.bfloat16(), column_CD.bfloat16()
    found, of_rows, _ = run(row_RD, column_CD, *rest, tau=0.05, num_lanes=1)
    again, of_rows_again, _ = run(row_RD.float(), column_CD.float(), *rest, tau=0.05, num_lanes=1)
    assert found.loss.dtype == torch.float32 and torch.equal(found.loss, again.loss)
    assert torch.equal(of_rows, of_rows_again)
