"""LoRA reaches every linear layer of every kind of model, or the run stops; the audit says so."""

import json
import re

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from training import flags, write_data
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    Dinov2Config,
    SiglipVisionConfig,
)
from transformers.pytorch_utils import Conv1D

from sqllava.model.adapters import (
    Lora,
    Training,
    adapter_shapes,
    adapter_state,
    check_adapter,
    lora_config,
    prepare_training,
    read_adapter,
    save_adapter,
    skeleton,
    trained_names,
    trained_parts,
)
from sqllava.model.config import SQLlavaConfig
from sqllava.model.model import SQLlavaForConditionalGeneration
from sqllava.train import run
from sqllava.train.audit import GradientAudit, GradientAuditError

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
TOWERS = {
    "clip": CLIPVisionConfig(**TOWER),
    "siglip": SiglipVisionConfig(**TOWER),
    "dinov2": Dinov2Config(**TOWER, mlp_ratio=2),
    "dinov2 with gates": Dinov2Config(**TOWER, mlp_ratio=2, use_swiglu_ffn=True),
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The linear layers of a block, counted in each model's own description.
LANGUAGE = {"llama": 7, "phi": 6, "phi3": 4, "qwen2": 7, "qwen3": 7, "gemma": 7, "gemma2": 7}
BOTH = Training(vision_lora=Lora(2, 4), language_lora=Lora(3, 6))
LAYERS_OF_A_TOWER_BLOCK = {"clip": 6, "siglip": 6, "dinov2": 6, "dinov2 with gates": 7}


def config_of(language="llama", tower="clip", **text):
    return SQLlavaConfig(
        vision_config=TOWERS[tower],
        text_config=AutoConfig.for_model(language, **TEXT | text),
        image_token_index=63,
        projector_type="mlp2x_gelu",
    )


def build(config):
    torch.manual_seed(0)
    return SQLlavaForConditionalGeneration(config)


def lora_paths(model, root):
    names = [name for name, _ in model.named_parameters() if ".lora_A." in name and root in name]
    return {name.removeprefix("base_model.model.").split(".lora_A")[0] for name in names}


def linear_in_blocks(part, path):
    """Counted anew: what of transformers' own model is a linear layer with a number in its path."""
    return {
        f"{path}.{name}"
        for name, module in part.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"\.\d+\.", f".{name}")
    }


@pytest.mark.parametrize("language", LANGUAGE)
def test_lora_reaches_every_linear_layer_of_a_language_model(language):
    config = config_of(language)
    expected = linear_in_blocks(AutoModel.from_config(config.text_config), "model.language_model")
    trained = prepare_training(build(config), BOTH)
    assert lora_paths(trained, "language_model") == expected
    assert len(expected) == 2 * LANGUAGE[language]
    counts = trained_parts(trained)["language model"]
    assert (counts.reached, counts.modules) == (len(expected), len(expected))


@pytest.mark.parametrize("tower", TOWERS)
def test_lora_reaches_every_linear_layer_of_a_tower(tower):
    config = config_of(tower=tower)
    expected = linear_in_blocks(AutoModel.from_config(TOWERS[tower]), "model.vision_tower")
    trained = prepare_training(build(config), BOTH)
    assert lora_paths(trained, "vision_tower") == expected
    assert len(expected) == 2 * LAYERS_OF_A_TOWER_BLOCK[tower]


@pytest.mark.parametrize(("language", "tower"), [("phi3", "dinov2"), ("phi", "siglip")])
def test_an_adapter_on_any_model_is_read_back_whole(language, tower, tmp_path):
    config = config_of(language, tower)
    trained = prepare_training(build(config), BOTH)
    state = adapter_state(trained)
    save_adapter(trained, state, tmp_path)
    adapter = read_adapter(tmp_path)
    assert (adapter.vision_lora, adapter.language_lora) == (Lora(2, 4), Lora(3, 6))
    check_adapter(adapter, config)
    shapes = {name: value.shape for name, value in state.items()}
    assert adapter_shapes(config, BOTH) == shapes


def test_tied_embeddings_stay_tied_and_take_no_lora():
    """As SmolLM's: the head is the table of embeddings."""
    model = build(config_of(tie_word_embeddings=True))
    trained = prepare_training(model, BOTH)
    assert not any("embed" in path or "head" in path for path in lora_paths(trained, ""))
    ids = torch.tensor([[1, 5, 6, 7]])
    trained(input_ids=ids, labels=ids).loss.backward()


def test_saved_adapters_of_the_published_models_still_open(tmp_path):
    """Their regexes name the published layers; what they reach is what is reached now."""
    config = config_of()
    trained = prepare_training(build(config), BOTH)
    save_adapter(trained, adapter_state(trained), tmp_path)
    old = {
        r"model\.vision_tower\.(.*\.)?layers\.\d+\.(self_attn|mlp)\."
        r"(q_proj|k_proj|v_proj|out_proj|fc1|fc2)": Lora(2, 4),
        r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\."
        r"(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)": Lora(3, 6),
    }
    file = tmp_path / "adapter_config.json"
    values = json.loads(file.read_text())
    values |= {
        "target_modules": "|".join(f"({regex})" for regex in old),
        "rank_pattern": {regex: lora.rank for regex, lora in old.items()},
        "alpha_pattern": {regex: lora.alpha for regex, lora in old.items()},
    }
    file.write_text(json.dumps(values))
    adapter = read_adapter(tmp_path)
    assert (adapter.vision_lora, adapter.language_lora) == (Lora(2, 4), Lora(3, 6))
    check_adapter(adapter, config)


def test_a_block_that_lora_reaches_in_part_stops_the_run():
    mixture = skeleton(config_of("mixtral", num_local_experts=2))
    with pytest.raises(ValueError, match=r"cannot reach all of the language model.*\(Mixtral"):
        lora_config(mixture, BOTH)
    lora_config(mixture, Training(vision_lora=Lora(2, 4)))
    transposed = skeleton(config_of())
    transposed.model.language_model.layers[1].mlp.up_proj = Conv1D(48, 32)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight \(Conv1D\)"):
        lora_config(transposed, BOTH)
    layerless = skeleton(config_of())
    layerless.model.language_model.layers = nn.ModuleList([nn.Identity(), nn.Identity()])
    with pytest.raises(ValueError, match="reaches nothing of the language model"):
        lora_config(layerless, BOTH)


def test_a_projector_without_weights_alone_trains_nothing():
    config = config_of()
    config.projector_type = "identity"
    with pytest.raises(ValueError, match="nothing trains"):
        prepare_training(build(config), Training())


def test_the_audit_judges_what_the_flags_ask_for():
    trained = prepare_training(build(config_of()), BOTH)
    audit = GradientAudit(trained, {}, BOTH)
    assert set(audit.names) == {n for n, p in trained.named_parameters() if p.requires_grad}
    name = next(n for n in trained_names(trained, BOTH) if "vision_tower" in n)
    trained.get_parameter(name).requires_grad_(False)
    with pytest.raises(GradientAuditError, match=re.escape(f"{name} is to train and is not")):
        GradientAudit(trained, {}, BOTH)
    with pytest.raises(GradientAuditError, match="is to stay and is set to train"):
        GradientAudit(trained, {}, Training(vision_lora=Lora(2, 4)))


def test_a_lora_that_reaches_nothing_fails_the_audit():
    """The fault of old: names that no layer of the model has."""
    model = build(config_of())
    nowhere = Lora(2, 4, targets=r"model\.vision_tower\.no_such_layer")
    missed = Training(vision_lora=nowhere, language_lora=Lora(2, 4))
    with pytest.warns(RuntimeWarning):
        trained = prepare_training(model, missed)
    with pytest.raises(GradientAuditError, match="vision_tower.*is to train"):
        GradientAudit(trained, {}, missed)


def test_the_table_counts_modules_and_the_projector_once():
    trained = prepare_training(build(config_of()), Training(vision_lora=Lora(2, 4)))
    counts = trained_parts(trained)
    projector = 32 * 32 + 32 + 32 * 32 + 32
    assert (counts["projector"].parameters, counts["projector"].trained) == (projector, projector)
    rates = dict.fromkeys(counts, 1e-3)
    table = GradientAudit(trained, rates, Training(vision_lora=Lora(2, 4))).table()
    rows = {line[:16].strip(): line[16:].split() for line in table.splitlines()}
    assert rows["language model"][:3] == ["0", "of", "14"]
    assert rows["language model"][-1] == "frozen"
    assert rows["projector"] == ["2", "of", "2", "2,112", "2,112", "0.001"]
    assert rows["vision tower"][:3] == ["12", "of", "12"]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_with_dinov2_trains_its_tower(stage, golden, tmp_path, caplog):
    torch.manual_seed(0)
    tower = tmp_path / "tower"
    AutoModel.from_config(TOWERS["dinov2"]).save_pretrained(tower)
    (tower / "preprocessor_config.json").write_text('{"crop_size": {"height": 14, "width": 14}}')
    data = write_data(tmp_path / "data.json", "caption" if stage == 1 else "image", count=8)
    caplog.set_level("INFO", "sqllava")
    out = tmp_path / "out"
    words = flags(stage, data, out, vision_tower=tower, mm_vision_select_layer=-1, max_steps=1)
    run.main([*words, "--mm_projector_type", "mlp2x_gelu"])
    assert re.search(r"vision tower +12 of 12", caplog.text)
    assert re.search(r"audit at step 1 passed for .*vision tower", caplog.text)
    state = load_file(out / "adapter_model.safetensors")
    tower_b = [key for key in state if "vision_tower" in key and "lora_B" in key]
    assert len(tower_b) == 12 and all(state[key].any() for key in tower_b)
    LoraConfig.from_pretrained(out)
