"""Exported checkpoints give the same embeddings in libraries that know nothing of this one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_backbones import KINDS, StockEncoder
from safetensors.torch import load_file

from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.errors import CheckpointError, OutputError
from umarvel_ray.export.formats import export
from umarvel_ray.model.encoder import Encoder
from umarvel_ray.model.settings import EncoderSettings, LoraSettings

SAME = {"atol": 1e-5, "rtol": 0.0}
"""float32 in another order of operations, on vectors of norm 1."""


def trained(start: str, folder: Path, *, rank: int, seed: int, **settings) -> str:
    """A checkpoint as a stage of training leaves it, its adapter not zero."""
    encoder = Encoder.load(start, settings=EncoderSettings(**settings) if settings else None)
    torch.manual_seed(seed)
    encoder.set_trainable("lora", LoraSettings(rank=rank, alpha=3 * rank), learn_temperature=False)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    encoder.eval().save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoints(backbones, tmp_path_factory) -> dict[str, str]:
    """Of each kind: two stages, one upon the other, of different rank."""
    home = tmp_path_factory.mktemp("checkpoints")
    return {
        kind: trained(
            trained(folder, home / f"{kind}-1", rank=2, seed=1, positions="sequential"),
            home / f"{kind}-2",
            rank=3,
            seed=2,
        )
        for kind, folder in backbones.items()
    }


@pytest.fixture(scope="module")
def plain(mixed_records) -> list[Query | Candidate]:
    """What all formats take: text, picture, both."""
    return [record for record in mixed_records if not record.parts]


def embed(path: str, records: list, **options) -> torch.Tensor:
    encoder = Encoder.load(path, **options)
    return encoder.embed_items([encoder.builder.build(record) for record in records])


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_alone_embeds_the_same(checkpoints, mixed_records, tmp_path, kind):
    export(checkpoints[kind], tmp_path / "out", format="transformers")
    stock = StockEncoder(str(tmp_path / "out"))
    torch.testing.assert_close(stock.embed(mixed_records), embed(checkpoints[kind], mixed_records), **SAME)
    assert not (tmp_path / "out" / "adapter").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "umarvel" not in json.dumps(config)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_peft_alone_puts_both_stages_on_the_first_backbone(
    backbones, checkpoints, mixed_records, tmp_path, kind
):
    from peft import PeftModel
    from transformers import AutoTokenizer

    export(checkpoints[kind], tmp_path / "out", format="peft")
    stock = StockEncoder(backbones[kind])
    stock.tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    adapted = PeftModel.from_pretrained(stock.model, str(tmp_path / "out"))
    stock.model = adapted.get_base_model()
    expected = embed(checkpoints[kind], mixed_records)
    torch.testing.assert_close(stock.embed(mixed_records), expected, **SAME)
    assert adapted.peft_config["default"].r == 5
    again = embed(str(tmp_path / "out"), mixed_records)
    torch.testing.assert_close(again, expected, **SAME)


_ELSEWHERE = """
import json, sys
sys.modules["umarvel_ray"] = None
import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer
folders, jobs, out = sys.argv[1:]
found = {}
for kind, folder in json.loads(folders).items():
    model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    rows = []
    for job in json.loads(jobs):
        image = Image.open(job["image"]) if job["image"] else None
        one = {"text": job["text"], "image": image} if image and job["text"] else image or job["text"]
        rows.append(model.encode([one, one], prompt=job["prompt"], batch_size=2)[1])
    found[kind] = np.stack(rows)
    found[f"{kind} texts"] = model.encode(["a kite", "the tower stands there"])
    assert model.get_embedding_dimension() == rows[0].shape[0]
np.savez(out, **found)
"""


@pytest.mark.slow
def test_sentence_transformers_alone_embeds_the_same(checkpoints, plain, tmp_path):
    """In a process where this package cannot be imported."""
    folders = {kind: str(tmp_path / kind) for kind in KINDS}
    for kind, folder in folders.items():
        export(checkpoints[kind], Path(folder), format="sentence-transformers")
    jobs = [
        {
            "text": record.txt or "",
            "image": record.img_path,
            "prompt": getattr(record, "instruction", None) or "",
        }
        for record in plain
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, json.dumps(folders), json.dumps(jobs), str(tmp_path / "x.npz")],
        cwd=tmp_path,
        env=environment | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    texts = [Candidate(did="1", txt="a kite"), Candidate(did="2", txt="the tower stands there")]
    with np.load(tmp_path / "x.npz") as found:
        for kind, checkpoint in checkpoints.items():
            np.testing.assert_allclose(found[kind], embed(checkpoint, plain).numpy(), **SAME)
            np.testing.assert_allclose(found[f"{kind} texts"], embed(checkpoint, texts).numpy(), **SAME)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"attention": "causal", "pooling": "last", "compression_prompt": True, "instruction": "pooled"},
        {"instruction": "none", "positions": "mrope"},
        {"max_text_tokens": 4, "append_generation_prompt": True},
    ],
    ids=["last", "mrope", "cut"],
)
def test_the_exported_module_keeps_to_all_settings(backbones, plain, tmp_path, settings):
    """In this process, to be quick."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    checkpoint = trained(backbones["qwen2_vl"], tmp_path / "start", rank=2, seed=1, **settings)
    export(checkpoint, tmp_path / "out", format="sentence-transformers")
    model = sentence_transformers.SentenceTransformer(
        str(tmp_path / "out"), trust_remote_code=True, device="cpu"
    )
    rows = []
    for record in plain:
        one = {"text": record.txt, "image": record.img_path} if record.txt and record.img_path else None
        one = one or record.txt or record.img_path
        rows.append(model.encode([one], prompt=getattr(record, "instruction", None) or "")[0])
    np.testing.assert_allclose(np.stack(rows), embed(checkpoint, plain).numpy(), **SAME)
    model.save(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(
        str(tmp_path / "saved"), trust_remote_code=True, device="cpu"
    )
    np.testing.assert_array_equal(again.encode(["a kite"]), model.encode(["a kite"]))


def test_the_exported_module_names_nothing_of_ours():
    text = Path(export.__code__.co_filename).with_name("sentence_transformers_module.py").read_text()
    imports = [line for line in text.splitlines() if line.lstrip().startswith(("import ", "from "))]
    assert imports and not any("umarvel" in line for line in imports)


def test_what_cannot_be_exported_is_refused(backbones, checkpoints, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="there: exists already"):
        export(checkpoints["qwen2_vl"], tmp_path / "there", format="transformers")
    with pytest.raises(CheckpointError, match=r"no embedding\.json"):
        export(backbones["qwen2_vl"], tmp_path / "out", format="peft")
    Encoder.load(backbones["qwen2_vl"]).save(tmp_path / "untrained")
    with pytest.raises(CheckpointError, match="no adapter in it"):
        export(str(tmp_path / "untrained"), tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()


def test_an_adapter_lies_beside_the_weights_it_was_merged_into(checkpoints):
    folder = Path(checkpoints["qwen2_vl"])
    state = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(state) == 2 * 7 * 2 and {part.shape[0] for n, part in state.items() if "lora_A" in n} == {3}
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder.with_name("qwen2_vl-1"))
