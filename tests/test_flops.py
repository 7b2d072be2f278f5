"""What a step computes: counted on the real modules, right for LoRA, and a share of a card."""

import pytest
import torch
from test_real_sizes import CLIP_VIT_L, VICUNA
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from sqllava.model.adapters import Lora, Training, prepare_training
from sqllava.model.config import SQLlavaConfig, cut_vision_config
from sqllava.model.model import SQLlavaForConditionalGeneration
from sqllava.train.flops import Work, costs_of, peak_flops

STAGE1 = Training(vision_lora=Lora(64, 128))
STAGE2 = Training(vision_lora=Lora(64, 128), language_lora=Lora(128, 256))
# Weights of Vicuna 7B's linear layers in its blocks, and those that LoRA adds to them.
BLOCKS, LORA = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 319_815_680


def tiny():
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
    )
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return SQLlavaConfig(
        vision_config=cut_vision_config(vision, -2),
        text_config=text,
        image_token_id=63,
        projector_options={"centres": 4},
    )


@pytest.mark.slow
def test_a_token_of_the_7b_recipe_costs_what_its_matrix_products_do():
    config = SQLlavaConfig(
        vision_config=cut_vision_config(CLIP_VIT_L, -2), text_config=VICUNA["7B"]
    )
    # Forward and the gradient of the input, of frozen weights; the weight's own for LoRA, too.
    assert costs_of(config, STAGE1).token == 4 * BLOCKS
    both = costs_of(config, STAGE2)
    assert both.token == 4 * BLOCKS + 6 * LORA
    # Scores and their sum, forward once and backward twice, in each of 32 layers.
    assert both.pair == 3 * 2 * 2 * 4096 * 32
    assert both.target == 4 * 4096 * 32000
    assert costs_of(config, Training(full_language=True)).token == 6 * BLOCKS


@pytest.mark.parametrize("training", [STAGE1, STAGE2, Training(), Training(full_language=True)])
def test_the_parts_add_up_to_what_a_whole_step_runs(training):
    config = tiny()
    tokens, images = 40, 2
    length = tokens + images * config.image_tokens
    ids = torch.tensor([[63] * images * config.image_tokens + [1] * tokens])
    # PyTorch counts none of the CPU's fused attention.
    whole = SQLlavaForConditionalGeneration._from_config(config, attn_implementation="eager")
    model = prepare_training(whole, training)
    pixels = torch.randn(images, 3, 28, 28)
    labels = torch.full_like(ids, -100)
    labels[0, -10:] = 1
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, pixel_values=pixels, labels=labels).loss.backward()
    # All pairs are computed, and those that are not seen thrown away.
    work = Work(tokens=length, pairs=length**2, images=images, targets=10)
    assert costs_of(config, training).of(work) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_frozen_beginning_saves_the_gradients_on_the_way_to_it():
    config = tiny()
    assert costs_of(config, Training()).image < costs_of(config, STAGE1).image
    frozen = costs_of(config, Training(projector=False, language_lora=Lora(4, 8)))
    assert frozen.token < costs_of(config, Training(language_lora=Lora(4, 8))).token


def test_the_count_is_the_same_where_zero3_is_set_up():
    alone = costs_of(tiny(), STAGE2)
    # transformers knows of ZeRO-3 as long as this lives
    zero3 = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    assert costs_of(tiny(), STAGE2) == alone
    assert is_deepspeed_zero3_enabled() and zero3.is_zero3()


@pytest.mark.parametrize(
    ("card", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
    ],
)
def test_known_cards_have_their_peak(card, tflops):
    assert peak_flops(card) == tflops * 1e12


def test_an_unknown_card_has_none():
    assert peak_flops("Radeon VII") is None
