"""The recipe with every path on an S3 endpoint, its driver killed in the middle: what a disk gives."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures_recipe import ALL_CONTROLS, require_equal
from fixtures_run import TinyRun

ROOT = Path(__file__).parents[2]
WORLD = {
    "data.root": "world/M-BEIR",
    "data.nli": "world/nli/nli_for_simcse.csv",
    "data.captions": "world/cc3m/chat.json",
    "data.caption_images": "world/cc3m/images",
    "backbone": "backbone",
}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An S3 server in a process of its own; the environment in which it is found."""
    moto = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "UMARVEL_CACHE": str(tmp_path_factory.mktemp("cache")),
    }
    server.stop()


def client(endpoint: dict[str, str]):
    """boto3's: an independent reader and writer of the same store."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=endpoint["AWS_ENDPOINT_URL"],
        aws_access_key_id=endpoint["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=endpoint["AWS_SECRET_ACCESS_KEY"],
        region_name=endpoint["AWS_DEFAULT_REGION"],
    )


def keys(s3, bucket: str, prefix: str = "") -> list[str]:
    """All of a bucket's keys."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    found = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    return [key for key in found if not key.endswith("/")]  # Arrow marks a folder whose last file it removed


def start(tiny: TinyRun, endpoint: dict[str, str], log: Path, *arguments: str) -> subprocess.Popen:
    with log.open("a") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "umarvel_ray.cli", *arguments],
            env={**os.environ, **endpoint},
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )


@pytest.mark.slow
@pytest.mark.cluster
def test_every_path_on_s3_and_a_killed_driver(tiny: TinyRun, finished, endpoint, tmp_path):
    s3 = client(endpoint)
    s3.create_bucket(Bucket="data")
    s3.create_bucket(Bucket="runs")
    for top in ("world", "backbone"):
        for path in (tiny.home / top).rglob("*"):
            if path.is_file() and not any(part[0] == "." for part in path.relative_to(tiny.home).parts):
                s3.upload_file(str(path), "data", str(path.relative_to(tiny.home)))
    given = len(keys(s3, "data"))
    places = [f"{key}=s3://data/{name}" for key, name in WORLD.items()]
    run = ("run", str(tiny.config), *places, ALL_CONTROLS, "output=s3://runs/tiny")
    log = tmp_path / "log"

    process = start(tiny, endpoint, log, *run)
    deadline = time.monotonic() + 150
    while not any(key.endswith(".arrow") for key in keys(s3, "runs", "tiny/embed/instruct/")):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    status = start(tiny, endpoint, tmp_path / "status", "status", "s3://runs/tiny")
    assert status.wait(timeout=60) == 0
    said = (tmp_path / "status").read_text()
    assert "works there, last sign" in said and "embed/instruct" in said
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "tiny/embed/instruct/done.json" not in keys(s3, "runs"), "killed too late"
    before = keys(s3, "runs", "tiny/train/text")
    kept = {key: s3.head_object(Bucket="runs", Key=key)["LastModified"] for key in before}

    assert start(tiny, endpoint, log, *run).wait(timeout=240) == 0, log.read_text()
    for key, written in kept.items():
        assert s3.head_object(Bucket="runs", Key=key)["LastModified"] == written, f"{key} was written again"
    left = [key for key in keys(s3, "runs") if ".tmp" in key or ".lock" in key or ".progress" in key]
    assert left == []
    assert len(keys(s3, "data")) == given, "a run writes nothing beside its data"
    for key in keys(s3, "runs"):
        target = tmp_path / key.removeprefix("tiny/")
        target.parent.mkdir(parents=True, exist_ok=True)
        s3.download_file("runs", key, str(target))
    require_equal(tmp_path, Path(finished[0].output))
