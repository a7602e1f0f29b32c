"""What others saved loads: releases of the authors, PEFT adapters, templates in files of their own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from umarvel_ray.data.records import Query
from umarvel_ray.errors import CheckpointError
from umarvel_ray.model.encoder import Encoder
from umarvel_ray.model.settings import LoraSettings

RECORDS = [Query(qid="1", txt="a red kite", instruction="Find a photo."), Query(qid="2", txt="a tower")]


def embed(encoder: Encoder) -> torch.Tensor:
    return encoder.embed_items([encoder.builder.build(record) for record in RECORDS])


@pytest.fixture
def release(backbone, tmp_path) -> Path:
    """As the authors save: names of before, the temperature among the weights, a table cut behind <emb>, ids
    in the config, a tokenizer without the added tokens."""
    folder = tmp_path / "release"
    shutil.copytree(backbone, folder)
    stored = load_file(folder / "model.safetensors")
    encoder = Encoder.load(backbone)
    emb = encoder._tokenizer.convert_tokens_to_ids("<emb>")
    weights = {}
    for name, part in stored.items():
        old = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        weights[old] = part.clone()
    table = next(name for name in weights if name.endswith("embed_tokens.weight"))
    weights[table] = weights[table][: emb + 1].clone()
    weights[table][emb] = torch.linspace(-1, 1, weights[table].shape[1])
    weights["sim.temp"] = torch.tensor(0.0204, dtype=torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Qwen2VLRetForConditionalGeneration"], "emb_token_id": emb}
    config["text_config"]["vocab_size"] = emb + 1
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_release_brings_its_temperature_and_its_rows(release, backbone):
    encoder = Encoder.load(release)
    assert encoder.temperature.item() == pytest.approx(0.0204, rel=2**-8)
    table = encoder.model.get_input_embeddings().weight
    ids = encoder._tokenizer.convert_tokens_to_ids(["<emb>", "<instruction_start>", "<instruction_end>"])
    width = table.shape[1]
    torch.testing.assert_close(table[ids[0]], torch.linspace(-1, 1, width))
    mean_D = table[: ids[0] + 1].mean(0)
    for number in ids[1:]:
        torch.testing.assert_close(table[number], mean_D)
    stock = Encoder.load(backbone).model.model
    for name, parameter in encoder.model.model.named_parameters():
        if "embed_tokens" not in name:
            assert torch.equal(parameter, stock.get_parameter(name)), name


def test_a_loaded_release_survives_saving(release, tmp_path):
    encoder = Encoder.load(release)
    before = embed(encoder)
    encoder.save(tmp_path / "ours")
    again = Encoder.load(tmp_path / "ours")
    assert torch.equal(embed(again), before)
    assert again.temperature.item() == encoder.temperature.item()


def test_ids_that_disagree_are_refused(release):
    config = json.loads((release / "config.json").read_text())
    config["emb_token_id"] -= 3
    (release / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"release: config\.json has <emb> as token \d+, the tokenizer"):
        Encoder.load(release)


def test_a_template_in_a_file_of_its_own_is_found(backbone, tmp_path):
    folder = tmp_path / "split"
    shutil.copytree(backbone, folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="no chat template"):
        Encoder.load(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert torch.equal(embed(Encoder.load(folder)), embed(Encoder.load(backbone)))


@pytest.fixture
def adapter(backbone, tmp_path) -> tuple[Path, torch.Tensor]:
    """An adapter as PEFT saves it while it trains, and what the model with it gives."""
    encoder = Encoder.load(backbone)
    torch.manual_seed(0)
    encoder.set_trainable("lora", LoraSettings(rank=2, alpha=4), learn_temperature=False)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    encoder.eval()
    encoder.model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": backbone}))
    return tmp_path / "adapter", embed(encoder)


def test_an_adapter_loads_merged_on_its_base(adapter, backbone, tmp_path):
    folder, expected = adapter
    torch.testing.assert_close(embed(Encoder.load(folder)), expected, atol=1e-5, rtol=0)
    moved = tmp_path / "moved"
    shutil.copytree(backbone, moved)
    torch.testing.assert_close(embed(Encoder.load(folder, base=str(moved))), expected, atol=1e-5, rtol=0)
    assert not any("lora" in name for name, _ in Encoder.load(folder).named_parameters())


def test_names_of_before_in_an_adapter_are_understood(adapter):
    folder, expected = adapter
    file = folder / "adapter_model.safetensors"
    old = {name.replace("model.language_model.", "model."): part for name, part in load_file(file).items()}
    save_file(old, file, metadata={"format": "pt"})
    torch.testing.assert_close(embed(Encoder.load(folder)), expected, atol=1e-5, rtol=0)


def test_an_adapter_that_is_not_really_loaded_is_refused(adapter, backbone):
    folder, _ = adapter
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    save_file({name: torch.zeros_like(part) for name, part in state.items()}, file)
    with pytest.raises(CheckpointError, match="changes nothing"):
        Encoder.load(folder)
    save_file({name.replace("layers.1.", "layers.7."): part for name, part in state.items()}, file)
    with pytest.raises(CheckpointError, match="no place in the model"):
        Encoder.load(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "Qwen/Nowhere"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="an adapter trained on Qwen/Nowhere, which is not here"):
        Encoder.load(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        Encoder.load(folder, base=backbone)


def test_merging_in_half_precision_rounds_once(backbone):
    """The sum is made in float32: bfloat16 weights get the nearest value to weight + product."""
    encoder = Encoder.load(backbone, dtype="bfloat16")
    encoder.set_trainable("lora", LoraSettings(rank=2, alpha=4), learn_temperature=False)
    layer = encoder.model.get_base_model().model.language_model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(std=0.01)
    weight = layer.base_layer.weight.float().clone()
    product = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float() * 2
    from umarvel_ray.model.lora import merge_lora

    merged = merge_lora(encoder.model).model.language_model.layers[0].mlp.up_proj.weight
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, (weight + product).to(torch.bfloat16))
