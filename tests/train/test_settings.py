"""Settings that cannot train are refused as settings: nothing is loaded for that."""

from typing import Any

import pytest

from umarvel_ray.config import build_config
from umarvel_ray.errors import ConfigError
from umarvel_ray.runtime.cluster import RuntimeSettings
from umarvel_ray.train.settings import StageConfig

TRAIN = {"batch_size": 8, "num_steps": 1, "learning_rate": 1e-3}
MBEIR = {"kind": "mbeir", "root": "/data/M-BEIR"}


def refused(schema: Any, message: str, **values: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(values, schema)


def stage(**values: Any) -> dict[str, Any]:
    return {"start": "/x", "output": "/y", "seed": 0, "data": MBEIR, "train": TRAIN} | values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": TRAIN | {"lora": {"targets": ["q_proj", "w_proj"]}}}, "train.lora.targets.1.*w_proj"),
        ({"train": TRAIN | {"lora": {"targets": []}}}, "train.lora.targets"),
        ({"train": TRAIN | {"num_epochs": 1}}, "num_steps or num_epochs"),
        ({"train": TRAIN | {"trainable": "full", "vision_store": "/v"}}, "features of a frozen tower"),
        (
            {"model": "reranker", "data": MBEIR | {"lists": "/l"}, "train": TRAIN | {"vision_store": "/v"}},
            "a reranker keeps none",
        ),
        ({"loss": {"kind": "distillation"}}, "no teacher's scores are given"),
        (
            {"loss": {"kind": "distillation"}, "data": MBEIR | {"lists": "/n.arrow"}},
            "no teacher's scores are given",
        ),
        ({"loss": {"negatives": "own"}}, "queries have no lists"),
        ({"model": "reranker"}, "a reranker learns from lists"),
    ],
)
def test_a_stage(values, message):
    refused(StageConfig, message, **stage(**values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"num_workers": 4, "min_workers": 2, "strategy": {"kind": "deepspeed", "zero_stage": 3}},
            r"deepspeed \(ZeRO-3\) is made for a fixed number of workers",
        ),
        ({"num_workers": 2, "min_workers": 3}, "more than num_workers"),
        ({"kind": "local", "strategy": {"kind": "fsdp2"}}, "which fsdp2 cannot"),
        ({"strategy": {"offload_optimizer": True}}, "offload_optimizer is deepspeed's"),
    ],
)
def test_who_does_the_work(values, message):
    refused(RuntimeSettings, message, **values)


def test_what_is_right_is_taken():
    lists = {"lists": "/n.arrow", "list_role": "teacher"}
    build_config(stage(loss={"kind": "distillation"}, data=MBEIR | lists), StageConfig)
    build_config({"num_workers": 4, "min_workers": 2, "strategy": {"kind": "fsdp2"}}, RuntimeSettings)
