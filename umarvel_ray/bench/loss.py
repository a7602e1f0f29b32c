"""`umarvel bench loss`: InfoNCE over a global batch, what one of W workers computes for it.

The process plays one worker; the embeddings of the others are there, as after the gather. The answer is the
gradient of its own queries and candidates. What a peer would receive from other workers is there too: only
computation is timed, to the peers' advantage (one sends a (B, D) gradient, ours sends B numbers).
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from umarvel_ray.bench.harness import Answer, Benchmark, BenchmarkError, Case, Prepared
from umarvel_ray.train.gather import Lanes
from umarvel_ray.train.slab import info_nce

_TEMPERATURE = 0.02
_BLOCK = 256


class _OneOfMany(Lanes):
    """The first lane alone; what the others would send is known."""

    def __init__(self, count: int, lse_R1: Tensor) -> None:
        super().__init__(count)
        self.mine = [0]
        self._lse_R1 = lse_R1

    def gather(self, parts: Mapping[int, Tensor], items: Sequence[np.ndarray]) -> Tensor:
        gathered = self._lse_R1.clone()
        gathered[torch.from_numpy(items[0])] = parts[0]
        return gathered


class _Data:
    """Embeddings of the global batch: each query near its positive, `negatives` hard ones behind it.

    Attributes:
        query_QD, candidate_CD: Unit norm; candidates lie as [positive, negative, …] of query 0, of query 1, …
        rows, columns: How many of each belong to the worker that is played, the first one.
        group: Candidates of a query.
    """

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)
        num, dim = case["batch"], case["dim"]
        self.group = 1 + case["negatives"]
        self.rows = num // case["workers"]
        self.columns = self.rows * self.group
        self.workers = case["workers"]
        self.query_QD = F.normalize(torch.randn(num, dim, generator=generator), dim=1)
        self.candidate_CD = torch.empty(num * self.group, dim)
        for start in range(0, num, _BLOCK):
            queries = self.query_QD[start : start + _BLOCK].repeat_interleave(self.group, 0)
            noise = torch.randn(queries.shape, generator=generator) * (8 / dim**0.5)
            self.candidate_CD[start * self.group : start * self.group + len(queries)] = F.normalize(
                queries + noise, dim=1
            )

    @property
    def targets(self) -> Tensor:
        """The column of each query's positive."""
        return torch.arange(len(self.query_QD)) * self.group

    def lse(self) -> Tensor:
        """Of all rows, (Q, 1), in small blocks."""
        blocks = self.query_QD.split(_BLOCK)
        found = [(block @ self.candidate_CD.T).div_(_TEMPERATURE).logsumexp(1) for block in blocks]
        return torch.cat(found)[:, None]


def _prepared(case: Case, gradient: Callable[[], tuple[Tensor, Tensor]]) -> Prepared:
    facts: dict[str, float] = {}

    def run() -> Answer:
        if facts:
            query, candidate = gradient()
        else:
            before = _resident("VmRSS", reset_peak=True)
            query, candidate = gradient()
            facts["extra_bytes"] = max(1, _resident("VmHWM") - before)
        return {"query": query.numpy(), "candidate": candidate.numpy()}

    return Prepared(run=run, work=case["batch"] / case["workers"], facts=facts)


def _resident(field: str, *, reset_peak: bool = False) -> int:
    """Bytes of memory of this process: now (VmRSS), or the most since the peak was reset (VmHWM)."""
    if reset_peak:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def _ours(case: Case) -> Prepared:
    data = _Data(case)
    lanes = _OneOfMany(data.workers, data.lse())
    # Lanes of the others are not computed here: only which rows and columns are ours is asked.
    rows, columns = [np.arange(data.rows)], [np.arange(data.columns)]
    targets = data.targets.numpy()
    nobody = np.array([], dtype=np.int64)

    def gradient() -> tuple[Tensor, Tensor]:
        found = info_nce(
            data.query_QD,
            data.candidate_CD,
            target_R=targets,
            ignore=(nobody, nobody),
            temperature=torch.tensor(_TEMPERATURE),
            rows=rows,
            columns=columns,
            lanes=lanes,
        )
        return found.rows[0], found.columns[0]

    return _prepared(case, gradient)


def _full(case: Case) -> Prepared:
    """The authors' way: the whole matrix on every worker; its own slice alone carries a gradient."""
    data = _Data(case)

    def gradient() -> tuple[Tensor, Tensor]:
        own_q = data.query_QD[: data.rows].clone().requires_grad_()
        own_c = data.candidate_CD[: data.columns].clone().requires_grad_()
        query = torch.cat([own_q, data.query_QD[data.rows :]])
        candidate = torch.cat([own_c, data.candidate_CD[data.columns :]])
        F.cross_entropy(query @ candidate.T / _TEMPERATURE, data.targets).backward()
        assert own_q.grad is not None and own_c.grad is not None
        return own_q.grad, own_c.grad

    return _prepared(case, gradient)


def _rows(case: Case) -> Prepared:
    """open_clip's `local_loss` with `gather_with_grad`: own rows, and a (C, D) gradient to be summed."""
    data = _Data(case)
    others_JD = _columns_of_others(data)

    def gradient() -> tuple[Tensor, Tensor]:
        own_q = data.query_QD[: data.rows].clone().requires_grad_()
        candidate = data.candidate_CD.detach().requires_grad_()
        logits = own_q @ candidate.T / _TEMPERATURE
        loss = F.cross_entropy(logits, data.targets[: data.rows], reduction="sum") / len(data.query_QD)
        loss.backward()
        assert own_q.grad is not None and candidate.grad is not None
        return own_q.grad, candidate.grad[: data.columns] + others_JD

    return _prepared(case, gradient)


def _columns_of_others(data: _Data) -> Tensor:
    """What the reduce-scatter brings: the part of the own columns' gradient that other workers' rows give."""
    total = torch.zeros(data.columns, data.query_QD.shape[1])
    for start in range(data.rows, len(data.query_QD), _BLOCK):
        block = data.query_QD[start : start + _BLOCK]
        share = (block @ data.candidate_CD.T).div_(_TEMPERATURE).softmax(1)[:, : data.columns]
        total += share.T @ block
    return total / (_TEMPERATURE * len(data.query_QD))


def _compare(case: Case, ours: Answer, other: Answer) -> str:
    """Float32 sums of thousands of terms in another order: 1e-4 of the largest entry."""
    worst = 0.0
    for name in ("query", "candidate"):
        scale = float(np.abs(other[name]).max())
        worst = max(worst, float(np.abs(ours[name] - other[name]).max()) / scale)
    if not worst < 1e-4:
        raise BenchmarkError(f"gradients differ by {worst:.1e} of the largest entry.")
    return f"gradients within {worst:.0e}"


def _case(batch: int, negatives: int = 0, dim: int = 1536) -> Case:
    return {"batch": batch, "negatives": negatives, "dim": dim, "workers": 8}


BENCHMARK = Benchmark(
    about="InfoNCE over the global batch, gradient of one of 8 workers' own queries and candidates, D=1536",
    unit="queries",
    methods={"slab, tiled (ours)": _ours, "full matrix (authors)": _full, "rows + reduce-scatter": _rows},
    cases={
        "2048": _case(2048),
        "4096": _case(4096),
        "8192": _case(8192),
        "1408 + 5 hard": _case(1408, negatives=5),
    },
    quick=("2048",),
    compare=_compare,
    repeats=2,
)
