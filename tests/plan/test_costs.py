"""Sizes of the released backbones are the published ones; those of any other are its modules' own."""

import json

import pytest

from umarvel_ray.errors import CheckpointError
from umarvel_ray.plan.costs import QWEN2_VL_2B, QWEN2_VL_7B, shape_of


@pytest.mark.parametrize(
    ("shape", "decoder", "per_token", "all_of"),
    [(QWEN2_VL_2B, 1.310e9, 2.62e9, 2.44e9), (QWEN2_VL_7B, 6.525e9, 13.05e9, 8.29e9)],
)
def test_released_backbones_have_their_published_sizes(shape, decoder, per_token, all_of):
    assert shape.decoder_params == pytest.approx(decoder, rel=1e-3)
    assert shape.decode(1) == pytest.approx(per_token, rel=1e-2)
    assert shape.vision_params == pytest.approx(0.67e9, rel=2e-2)
    assert shape.see(100) / 100 == pytest.approx(5.4e9, rel=2e-2)  # the same tower in both
    assert shape.params == pytest.approx(all_of, rel=1e-2)
    assert QWEN2_VL_7B.lora_params(128) == pytest.approx(323e6, rel=1e-2)


def test_a_backbone_in_a_folder_is_counted_like_its_modules(tmp_path):
    """Independent count: the weights of every linear layer that Transformers makes."""
    torch = pytest.importorskip("torch")
    from fixtures_model import CONFIG

    from umarvel_ray.demo.backbone import make_backbone

    make_backbone(["a red square"], tmp_path / "backbone", CONFIG)
    from transformers import Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "backbone")
    shape = shape_of(str(tmp_path / "backbone"))
    linear = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    decoder = sum(n for name, n in linear.items() if "language_model" in name)
    assert shape.decoder_params == decoder
    vision = sum(n for name, n in linear.items() if "visual" in name)
    patches = model.model.visual.patch_embed.proj.weight.numel()
    assert shape.vision_params == vision + patches


def test_sizes_of_a_later_vision_tower_are_found_under_their_names(tmp_path):
    config = {
        "text_config": {
            "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 6, "vocab_size": 10,
        },
        "vision_config": {"hidden_size": 4, "intermediate_size": 12, "depth": 3, "patch_size": 16},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = shape_of(str(tmp_path))
    assert (shape.head_dim, shape.vision_width, shape.vision_inner, shape.patch) == (6, 4, 12, 16)


def test_a_released_backbone_is_known_by_name_and_no_other():
    assert shape_of("/nowhere/Qwen2-VL-2B-Instruct") is QWEN2_VL_2B
    assert shape_of("hf://Qwen/Qwen2-VL-7B-Instruct") is QWEN2_VL_7B
    with pytest.raises(CheckpointError, match=r"^/nowhere/other: no config\.json there"):
        shape_of("/nowhere/other")
