"""Towers of other kinds: of each transformers' own hidden state is read, or it is refused."""

import json

import pytest
import torch
from transformers import (
    AutoModel,
    BeitConfig,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
    ViTMAEConfig,
)

import sqllava
from sqllava.checkpoint.convert import Options, convert
from sqllava.checkpoint.load import assemble
from sqllava.checkpoint.parts import load_tower
from sqllava.model.adapters import Lora, Training, adapter_state, prepare_training, save_adapter
from sqllava.model.tower import tower_end

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
KINDS = {
    "clip": (CLIPVisionConfig(**SMALL), 1),
    "siglip": (SiglipVisionConfig(**SMALL), 0),
    "siglip without a head": (SiglipVisionConfig(**SMALL, vision_use_head=False), 0),
    "dinov2": (Dinov2Config(**SMALL, mlp_ratio=2), 1),
    "dinov2 with registers": (Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2), 5),
    "dinov2 with gates": (Dinov2Config(**SMALL, mlp_ratio=2, use_swiglu_ffn=True), 1),
    "dinov3": (DINOv3ViTConfig(**SMALL, num_register_tokens=2), 3),
    "vit": (ViTConfig(**SMALL), 1),
    "deit": (DeiTConfig(**SMALL), 2),
    "beit": (BeitConfig(**SMALL), 1),
}


def tower(kind, folder):
    """A tower with weights of chance, norms included, as its makers would save it."""
    torch.manual_seed(0)
    model = AutoModel.from_config(KINDS[kind][0]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    settings = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"height": 28, "width": 28},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


def pixels():
    return torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("layer", [-2, -1, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_towers_features_are_transformers_own_hidden_state(kind, layer, tmp_path):
    whole = tower(kind, tmp_path)
    expected = whole(pixels(), output_hidden_states=True).hidden_states[layer]
    config = KINDS[kind][0]
    model = sqllava.SQLlavaModel(
        sqllava.SQLlavaConfig(
            vision_config=load_tower(str(tmp_path), layer, torch.float32, None).config,
            text_config={"model_type": "llama", **{k: SMALL[k] for k in list(SMALL)[:4]}},
            projector_type="identity",
            select_layer=layer,
        ),
        vision_tower=load_tower(str(tmp_path), layer, torch.float32, None),
    ).eval()
    before = KINDS[kind][1]
    assert tower_end(config).class_tokens == before
    found = torch.stack(model.get_image_features(pixels()).pooler_output)
    assert torch.equal(found, expected[:, before:])
    model.config.vision_feature_select_strategy = "full"
    assert torch.equal(torch.stack(model.get_image_features(pixels()).pooler_output), expected)
    assert model.config.image_tokens == 16 + before


@pytest.mark.parametrize("kind", ["siglip", "dinov2"])
def test_an_adapter_on_another_tower_opens(kind, golden, tmp_path):
    tower(kind, tmp_path / "tower")
    base = str(golden / "vicuna-tiny")
    torch.manual_seed(2)
    model, processor = assemble(base, str(tmp_path / "tower"), projector_type="mlp2x_gelu")
    assert processor.image_tokens == model.config.image_tokens == 16
    trained = prepare_training(model, Training(vision_lora=Lora(2, 4), language_lora=Lora(2, 4)))
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    inputs = processor(images=torch.zeros(3, 50, 40, dtype=torch.uint8), text="<image>\nHi")
    with torch.no_grad():
        expected = trained.eval()(**inputs).logits
    save_adapter(trained, adapter_state(trained), tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    opened, _ = sqllava.load(tmp_path / "adapter", dtype="float32")
    with torch.no_grad():
        assert torch.allclose(opened(**inputs).logits, expected, atol=1e-4)
    if kind == "siglip":  # of DINOv2 the files' names are not the modules', which convert refuses
        convert(tmp_path / "adapter", tmp_path / "merged", "merged", Options(check=False))
        opened, _ = sqllava.load(tmp_path / "merged", dtype="float32")
        with torch.no_grad():
            assert torch.allclose(opened(**inputs).logits, expected, atol=1e-4)


def test_the_norm_past_the_cut_is_neither_needed_nor_kept(tmp_path, caplog):
    from safetensors.torch import load_file, save_file

    tower("siglip", tmp_path)
    caplog.set_level("INFO", "sqllava")
    load_tower(str(tmp_path), -2, torch.float32, None)
    assert "post_layernorm.weight" in caplog.text
    weights = load_file(tmp_path / "model.safetensors")
    kept = {n: v for n, v in weights.items() if "post_layernorm" not in n}
    assert len(kept) == len(weights) - 2
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_tower(str(tmp_path), -2, torch.float32, None)
    lost = next(name for name in kept if "layers.1" in name)
    del kept[lost]
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing: " + lost.replace(".", r"\.")):
        load_tower(str(tmp_path), -2, torch.float32, None)


def test_clips_own_norm_keeps_its_place_as_no_hidden_state_passes_it(golden):
    loaded = load_tower(str(golden / "clip-tiny"), -2, torch.float32, None)
    assert tower_end(loaded.config).last_norm is None
    assert "post_layernorm.weight" in loaded.state_dict()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Siglip2VisionConfig(patch_size=7), "'siglip2_vision_model' cannot be read"),
        (ViTMAEConfig(**SMALL), "for 16 patches it gives features of shape"),
        (SwinConfig(), "'swin' cannot be read"),
    ],
)
def test_a_tower_that_cannot_be_read_right_is_refused(config, message, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_tower(str(tmp_path), -2, torch.float32, None)


def test_a_class_token_that_is_not_there_cannot_be_kept(golden, tmp_path):
    tower("siglip", tmp_path)
    with pytest.raises(ValueError, match="no class token.*choose patch"):
        assemble(str(golden / "vicuna-tiny"), str(tmp_path), vision_feature_select_strategy="full")
