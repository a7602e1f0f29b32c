"""Processes that talk over gloo give the gradients of one process that plays all their lanes.

`ddp` to the last bit. The strategies that shard add in an order of their own: to float32 rounding.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_model import ListSet, training_item
from torch import Tensor

from umarvel_ray.data.batches import BatchPlan
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.model.encoder import Encoder
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.model.settings import LoraSettings
from umarvel_ray.train.contrastive import ContrastiveTask
from umarvel_ray.train.gather import Lanes, WorkerLanes
from umarvel_ray.train.pairs import RerankerTask
from umarvel_ray.train.settings import (
    ContrastiveSettings,
    RerankerTrainSettings,
    StrategySettings,
    TrainSettings,
)
from umarvel_ray.train.strategy import make_strategy


def hard_negatives(pictures: dict[str, str]) -> ListSet:
    """Ragged lists, words and pictures, a second positive: lanes differ in items, tokens and chunks."""
    photos = {name: Candidate(did=f"9:{name}", img_path=path) for name, path in pictures.items()}
    sea = Candidate(did="9:sea", txt="At sea.")
    kite = Query(qid="9:1", txt="a kite", instruction="Find.")
    return ListSet(
        (
            training_item(kite, photos["kite"], photos["hill"], others=[sea]),
            training_item(Query(qid="9:2", img_path=pictures["boat"]), sea, others=[photos["hill"]]),
            training_item(Query(qid="9:3", txt="a tower " * 9), photos["tower"]),
        )
    )


def one_picture(pictures: dict[str, str]) -> ListSet:
    """The picture goes to one lane; the others have texts alone, or, of four, nothing at all."""
    photo, text = Candidate(did="9:1", img_path=pictures["boat"]), Candidate(did="9:2", txt="No.")
    return ListSet((training_item(Query(qid="9:1", txt="a boat"), photo, others=[text]),))


CASES: list[dict[str, Any]] = [
    {"data": hard_negatives, "trainable": "lora", "max_tokens": 60},
    {"data": hard_negatives, "trainable": "lora", "max_tokens": 8192},
    {"data": one_picture, "trainable": "full", "max_tokens": 8192},
    {"data": hard_negatives, "trainable": "full", "max_tokens": 60, "model": "reranker"},
]
HALF_CASES = [CASES[1], CASES[2]]
FEW_CASES = [CASES[0], CASES[2]]
STRATEGIES = {
    "fsdp2": StrategySettings(kind="fsdp2"),
    **{f"zero{stage}": StrategySettings(kind="deepspeed", zero_stage=stage) for stage in (1, 2, 3)},
    "offload": StrategySettings(kind="deepspeed", zero_stage=2, offload_optimizer=True),
}
HALF = ["ddp half", "fsdp2 half", "zero2 half", "zero3 half"]
NAMES = {2: ["ddp", *STRATEGIES, *HALF], 4: ["ddp", "fsdp2", "zero1", "zero2", "zero3"]}
"""What groups of two and of four workers do."""
NUM_STEPS = 2


def load(backbone: str, case: dict[str, Any], dropout: float, *, half: bool) -> Encoder | Reranker:
    """The same on every worker, adapters as after some steps."""
    torch.set_num_threads(1)
    torch.manual_seed(2)
    lora = LoraSettings(rank=2, alpha=4, dropout=dropout)
    model: Encoder | Reranker
    if case.get("model") == "reranker":
        model = Reranker.load(backbone)
        model.set_trainable(case["trainable"], lora)
    else:
        frozen_half = half and case["trainable"] == "lora"
        model = Encoder.load(backbone, dtype="bfloat16" if frozen_half else "float32")
        model.set_trainable(case["trainable"], lora, learn_temperature=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.train()


def trained(
    backbone: str,
    pictures: dict[str, str],
    lanes: Lanes,
    case: dict[str, Any],
    how: StrategySettings,
    *,
    dropout: float,
    half: bool = False,
) -> dict[str, Tensor]:
    """Losses and gradient norms of two steps, gradients of the first where they lie whole, and the state."""
    model, data = load(backbone, case, dropout, half=half), case["data"](pictures)
    # Clipping bites; AdamW's second moments are away from 0, so that rounding is not blown up into signs.
    settings = TrainSettings(batch_size=len(data), num_steps=2, learning_rate=1e-3, max_grad_norm=0.05)
    strategy = make_strategy(model, lanes, settings, how, half=half)
    plan = BatchPlan(num_rows=len(data), batch_size=len(data), seed=1)
    rest: dict[str, Any] = {"plan": plan, "strategy": strategy, "max_tokens": case["max_tokens"]}
    if isinstance(model, Encoder):
        task: Any = ContrastiveTask(model, data, ContrastiveSettings(candidate_to_query=1.0), **rest)
    else:
        task = RerankerTask(model, data, RerankerTrainSettings(), seed=3, **rest)
    found: dict[str, Tensor] = {}
    for step in range(NUM_STEPS):
        loss = task.backward(task.prepare(step), seed=3)["loss"]
        if isinstance(model, Encoder):
            assert model.temperature.grad is not None
            found[f"grad{step}/temperature"] = model.temperature.grad.clone()
        if how.kind == "ddp" and step == 0:
            found |= {f"grad/{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        norm = strategy.clip(settings.max_grad_norm)
        strategy.step(1e-3)
        found[f"loss{step}"], found[f"norm{step}"] = torch.tensor(loss), torch.tensor(norm)
    return found | strategy.state()


def start(rank: int, world: int, folder: str) -> WorkerLanes:
    """Join the other workers."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    store = torch.distributed.FileStore(f"{folder}/store", world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    return WorkerLanes()


def work(
    rank: int, world: int, backbone: str, pictures: dict[str, str], folder: str, names: list[str]
) -> None:
    """One of the workers: all cases, strategy by strategy."""
    lanes = start(rank, world, folder)
    for name in names:
        how = STRATEGIES.get(name.removesuffix(" half"), StrategySettings())
        half = name.endswith("half")
        dropout = 0.0 if how != StrategySettings() or half else 0.2
        cases = HALF_CASES if half else CASES if world == 2 or name == "ddp" else FEW_CASES
        found = [trained(backbone, pictures, lanes, case, how, dropout=dropout, half=half) for case in cases]
        torch.save(found, f"{folder}/{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found_by(
    backbone, pictures, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, str, int], list[dict[str, Tensor]]]:
    """(number of workers, strategy, rank) → what that worker found in each case. A group starts once: most of
    its time is the start."""
    folders: dict[int, Path] = {}

    def found(world: int, name: str, rank: int) -> list[dict[str, Tensor]]:
        if world not in folders:
            folder = tmp_path_factory.mktemp(f"workers{world}")
            arguments = (world, backbone, pictures, str(folder), NAMES[world])
            torch.multiprocessing.spawn(work, arguments, nprocs=world)
            folders[world] = folder
        return torch.load(folders[world] / f"{name}-{rank}.pt", weights_only=True)

    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_workers_give_the_steps_of_one_process_with_all_lanes(found_by, backbone, pictures, world):
    plain = StrategySettings()
    expected = [trained(backbone, pictures, Lanes(world), case, plain, dropout=0.2) for case in CASES]
    for rank in range(world):
        for found, alone in zip(found_by(world, "ddp", rank), expected, strict=True):
            assert found.keys() == alone.keys()
            differing = [name for name in alone if not torch.equal(found[name], alone[name])]
            assert not differing, (
                f"rank {rank}: {len(differing)} of {len(alone)} differ (first: {differing[0]})"
            )
    assert all(
        any(g.abs().max() > 1e-4 for n, g in case.items() if n.startswith("grad/")) for case in expected
    )


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_strategy_takes_the_steps_of_one_process(found_by, backbone, pictures, world):
    """First moments after two steps are 0.09 and 0.1 times the clipped gradients: equal moments are equal
    gradients, whatever shard they lie in. The one process has a single lane: the joined batch.
    """
    plain = StrategySettings()
    cases = CASES if world == 2 else FEW_CASES
    expected = [trained(backbone, pictures, Lanes(1), case, plain, dropout=0.0) for case in cases]
    for name in (name for name in NAMES[world] if name in STRATEGIES):
        for number, (found, alone) in enumerate(zip(found_by(world, name, 0), expected, strict=True)):
            wanted = {key: value for key, value in alone.items() if not key.startswith("grad/")}
            assert found.keys() == wanted.keys()
            for key, value in wanted.items():
                where = f"{name}, case {number}, {key}"
                if key.endswith("exp_avg"):
                    largest = max(v.abs().max().item() for k, v in wanted.items() if k.endswith("exp_avg"))
                    torch.testing.assert_close(
                        found[key], value, rtol=1e-3, atol=1e-5 * largest, msg=lambda m, w=where: f"{w}: {m}"
                    )
                elif key.startswith(("loss", "norm", "grad")):
                    assert found[key].item() == pytest.approx(value.item(), rel=1e-4), where


@pytest.mark.slow
def test_half_precision_keeps_float32_masters(found_by, backbone, pictures):
    """Computed in bfloat16, near the float32 run; what is trained holds values that bfloat16 cannot."""
    plain = StrategySettings()
    expected = [trained(backbone, pictures, Lanes(1), case, plain, dropout=0.0) for case in HALF_CASES]
    for name in HALF:
        for number, (found, wanted) in enumerate(zip(found_by(2, name, 0), expected, strict=True)):
            where = f"{name}, case {number}"
            assert found["loss0"].item() == pytest.approx(wanted["loss0"].item(), rel=0.1), where
            weights = {
                key: value for key, value in found.items() if key.startswith("model.") and "/" not in key
            }
            assert all(value.dtype == torch.float32 for value in weights.values()), where
            finer = [
                key for key, value in weights.items() if not torch.equal(value, value.bfloat16().float())
            ]
            assert len(finer) > len(weights) / 2, where


@pytest.mark.parametrize("count", [1, 2, 3])
def test_gathered_rows_stand_in_batch_order(count):
    """Whatever lane computed a row, it lands at its item's index."""
    rng = np.random.default_rng(count)
    order = rng.permutation(7)
    items = [np.sort(part) for part in np.array_split(order, count)]
    rows = torch.arange(14.0).view(7, 2)
    parts = {lane: rows[torch.from_numpy(indices)] for lane, indices in enumerate(items)}
    assert torch.equal(Lanes(count).gather(parts, items), rows)


def test_one_process_leads_and_sums_in_lane_order():
    lanes = Lanes(3)
    assert lanes.leads and list(lanes.mine) == [0, 1, 2]
    parts = [torch.tensor([1e8, 1.0]), torch.tensor([1.0, 2.0]), torch.tensor([-1e8, 3.0])]
    assert lanes.sum(parts).tolist() == [0.0, 6.0]
    assert parts[0].tolist() == [1e8, 1.0]
