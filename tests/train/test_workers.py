"""Two processes that talk over gloo give the gradients of one process that plays both, to the last bit."""

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
from umarvel_ray.model.settings import LoraSettings
from umarvel_ray.train.contrastive import ContrastiveTask
from umarvel_ray.train.gather import Lanes, WorkerLanes
from umarvel_ray.train.settings import ContrastiveSettings


def hard_negatives(pictures: dict[str, str]) -> ListSet:
    """Ragged lists, words and pictures: lanes differ in items, tokens and chunks."""
    photos = {name: Candidate(did=f"9:{name}", img_path=path) for name, path in pictures.items()}
    sea = Candidate(did="9:sea", txt="At sea.")
    return ListSet(
        (
            training_item(Query(qid="9:1", txt="a kite", instruction="Find."), photos["kite"], others=[sea]),
            training_item(Query(qid="9:2", img_path=pictures["boat"]), sea, others=[photos["hill"]]),
            training_item(Query(qid="9:3", txt="a tower " * 9), photos["tower"]),
        )
    )


def one_picture(pictures: dict[str, str]) -> ListSet:
    """The picture goes to the first lane; the second has texts alone."""
    photo, text = Candidate(did="9:1", img_path=pictures["boat"]), Candidate(did="9:2", txt="No.")
    return ListSet((training_item(Query(qid="9:1", txt="a boat"), photo, others=[text]),))


CASES: list[dict[str, Any]] = [
    {"data": hard_negatives, "trainable": "lora", "max_tokens": 60},
    {"data": hard_negatives, "trainable": "lora", "max_tokens": 8192},
    {"data": one_picture, "trainable": "full", "max_tokens": 8192},
]


def gradients(
    backbone: str, pictures: dict[str, str], lanes: Lanes, case: dict[str, Any]
) -> dict[str, Tensor]:
    """The loss and all gradients of one step, dropout on."""
    torch.set_num_threads(1)
    encoder = Encoder.load(backbone)
    torch.manual_seed(2)
    lora = LoraSettings(rank=2, alpha=4, dropout=0.2)
    encoder.set_trainable(case["trainable"], lora, learn_temperature=True)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    data = case["data"](pictures)
    plan = BatchPlan(num_rows=len(data), batch_size=len(data), seed=1)
    settings = ContrastiveSettings(candidate_to_query=1.0)
    task = ContrastiveTask(
        encoder.train(), data, settings, plan=plan, lanes=lanes, max_tokens=case["max_tokens"]
    )
    loss = task.backward(task.prepare(0), seed=3)["loss"]
    trained = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    return {"loss": torch.tensor(loss, dtype=torch.float64), **trained}


def work(rank: int, backbone: str, pictures: dict[str, str], folder: str) -> None:
    """One of two workers: all cases, one after the other."""
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found = [gradients(backbone, pictures, WorkerLanes(), case) for case in CASES]
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_workers_give_the_gradients_of_one_process_with_both_lanes(backbone, pictures, tmp_path: Path):
    context = torch.multiprocessing.spawn(work, (backbone, pictures, str(tmp_path)), nprocs=2, join=False)
    expected = [gradients(backbone, pictures, Lanes(2), case) for case in CASES]
    while not context.join(timeout=60):
        pass
    for rank in (0, 1):
        for found, alone in zip(
            torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected, strict=True
        ):
            assert found.keys() == alone.keys()
            differing = [name for name in alone if not torch.equal(found[name], alone[name])]
            assert not differing, (
                f"rank {rank}: {len(differing)} of {len(alone)} differ (first: {differing[0]})"
            )
    assert all(any(g.abs().max() > 1e-4 for n, g in case.items() if n != "loss") for case in expected)


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
