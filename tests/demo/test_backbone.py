import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from umarvel_ray.demo.backbone import SPECIAL_TOKENS, BackboneConfig, make_backbone
from umarvel_ray.errors import OutputError

TEXTS = ["A small red circle on a dark ground.", "Find the caption of this picture."] * 5
CONFIG = BackboneConfig(
    seed=1,
    hidden_size=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=64,
    vocab_size=400,
    vision_embed_dim=16,
    vision_depth=1,
    vision_num_heads=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("backbone") / "tiny"
    make_backbone(TEXTS, output, CONFIG)
    return output


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_special_tokens_are_single_ids_in_qwens_order(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(ids[0], ids[0] + len(SPECIAL_TOKENS)))
    assert ids[-1] == len(tokenizer) - 1
    assert [tokenizer(token)["input_ids"] for token in SPECIAL_TOKENS] == [[number] for number in ids]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_the_answers_are_single_tokens(tokenizer):
    for word in ("Yes", "No", " Yes", " No"):
        assert len(tokenizer(word)["input_ids"]) == 1


def test_any_text_survives_the_tokenizer(tokenizer):
    text = "Ein Drachen, 37 € – 風箏!\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_template_is_qwens(tokenizer):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A kite."}]},
        {"role": "assistant", "content": "Yes"},
    ]
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    user = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>A kite.<|im_end|>\n"
    assert (
        tokenizer.apply_chat_template(messages, tokenize=False)
        == system + user + "<|im_start|>assistant\nYes<|im_end|>\n"
    )
    assert (
        tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        == system + user + "<|im_start|>assistant\n"
    )
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert (
        tokenizer.apply_chat_template(own, tokenize=False)
        == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    )


def test_model_and_image_settings_load_and_fit_together(folder, tokenizer):
    from transformers import AutoConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    config = AutoConfig.from_pretrained(folder)
    for name, token in (
        ("image_token_id", "<|image_pad|>"),
        ("video_token_id", "<|video_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"),
    ):
        assert getattr(config, name) == tokenizer.convert_tokens_to_ids(token)
    assert sum(config.text_config.rope_parameters["mrope_section"]) == 48 // 2 // 2
    assert config.text_config.vocab_size >= len(tokenizer) + 3  # the recipe's markers need no larger table
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()
    assert model.lm_head.weight is model.get_input_embeddings().weight

    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    pixels = processor(np.zeros((56, 84, 3), dtype=np.uint8), return_tensors="pt")
    assert pixels["image_grid_thw"].tolist() == [[1, 4, 6]]
    prompt = "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>A kite."
    tokens = tokenizer(prompt, return_tensors="pt")
    tokens["mm_token_type_ids"] = (tokens["input_ids"] == config.image_token_id).int()
    with torch.no_grad():
        logits = model(**tokens, **pixels).logits
    assert logits.shape == (1, tokens["input_ids"].shape[1], config.text_config.vocab_size)
    assert torch.isfinite(logits).all()


def test_the_seed_decides_the_weights_and_nothing_outside_them(folder, tmp_path):
    def weights(path: Path) -> str:
        return hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()

    state = torch.random.get_rng_state()
    make_backbone(TEXTS, tmp_path / "same", CONFIG)
    make_backbone(TEXTS, tmp_path / "other", CONFIG.model_copy(update={"seed": 2}))
    assert torch.equal(state, torch.random.get_rng_state())
    assert weights(tmp_path / "same") == weights(folder) != weights(tmp_path / "other")
    assert (tmp_path / "same/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValidationError, match="hidden_size is 100"):
        BackboneConfig(seed=0, hidden_size=100)
    with pytest.raises(ValidationError, match="no multiple of num_kv_heads"):
        BackboneConfig(seed=0, num_kv_heads=3)
    with pytest.raises(ValidationError, match="vision_embed_dim is 72"):
        BackboneConfig(seed=0, vision_embed_dim=72)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="no checkpoint"):
        make_backbone(TEXTS, tmp_path, CONFIG)
    assert (tmp_path / "thesis.txt").exists()
