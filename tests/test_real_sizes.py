"""The real models on the meta device: their sizes are those of the paper's recipe."""

import pytest
import torch
from transformers import AutoModel, CLIPVisionConfig, LlamaConfig, LlamaForCausalLM

from sqllava.model.adapters import Lora, Training, prepare_training, trained_parts
from sqllava.model.config import SQLlavaConfig, cut_vision_config
from sqllava.model.model import SQLlavaForConditionalGeneration

CLIP_VIT_L = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
VICUNA = {
    "7B": LlamaConfig(),
    "13B": LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    ),
}
# One ViT-LoRA layer of rank r: q, k, v, out (1024 -> 1024) and fc1, fc2 (1024 <-> 4096).
VIT_LORA_LAYER = 4 * 2 * 1024 + 2 * (1024 + 4096)


def build(size):
    vision_config = cut_vision_config(CLIP_VIT_L, -2)
    with torch.device("meta"):
        tower = AutoModel.from_config(vision_config)
        text = LlamaForCausalLM(VICUNA[size])
        config = SQLlavaConfig(vision_config=vision_config, text_config=VICUNA[size])
        return SQLlavaForConditionalGeneration(config, tower, text.model, text.lm_head)


@pytest.mark.parametrize(
    ("size", "language_lora", "projector", "rank"),
    [
        ("7B", 319_815_680, 24_130_562, 64),
        ("7B", 319_815_680, 24_130_562, 32),
        ("13B", 500_695_040, 34_618_370, 64),
    ],
)
def test_parameter_counts_are_the_published_ones(size, language_lora, projector, rank):
    model = build(size)
    assert model.config.image_tokens == 576
    assert len(model.model.vision_tower.encoder.layers) == 23
    assert sum(p.numel() for p in model.model.multi_modal_projector.parameters()) == projector
    with torch.device("meta"):
        trained = prepare_training(
            model,
            Training(vision_lora=Lora(rank, 2 * rank, 0.2), language_lora=Lora(128, 256, 0.05)),
        )
    counts = {part: row.trained for part, row in trained_parts(trained).items()}
    unused_norm = 2 * 1024
    assert counts == {
        "language model": language_lora,
        "projector": projector - unused_norm,
        # The published count is of 24 layers, of which the last can never learn.
        "vision tower": {64: 28_311_552, 32: 14_155_776}[rank] * 23 // 24,
    }
    assert counts["vision tower"] == 23 * rank * VIT_LORA_LAYER


def test_plain_mlp_has_its_published_size():
    from sqllava.model.projector import build_projector

    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in build_projector("mlp2x_gelu", 1024, width).parameters())
            for width in (4096, 5120)
        ]
    assert sizes == [20_979_712, 31_467_520]
