"""Stage chains: what one stage leaves is what the next begins with, ours, published or merged."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training import GOLDEN, flags, write_data
from transformers import CLIPVisionConfig, CLIPVisionModel

import sqllava
from sqllava.checkpoint.convert import Options, convert
from sqllava.checkpoint.load import assemble
from sqllava.checkpoint.published import our_name
from sqllava.checkpoint.weights import read_tensors
from sqllava.train import run

# A run at this rate leaves its weights as it found them.
STANDING = {"learning_rate": 0.0, "vision_tower_lr": 0.0, "max_steps": 1}
SMALL_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "mixed.json", "mixed")


def test_pretrain_finetune_merge_finetune_again(mixed, tmp_path):
    captions = write_data(tmp_path / "captions.json", "caption")
    run.main(flags(1, captions, tmp_path / "stage1"))
    run.main(flags(2, mixed, tmp_path / "stage2", pretrain_mm_mlp_adapter=tmp_path / "stage1"))
    merged = tmp_path / "merged"
    convert(tmp_path / "stage2", merged, "merged", Options(check=False))
    expected, _ = sqllava.load(merged, dtype="float32")
    parts = {"model_name_or_path": merged, "vision_tower": merged}
    for name, changes in {
        "again": {},
        "named": {"pretrain_mm_mlp_adapter": merged},
        "full": {"lora_enable": None, "vit_lora_enable": None, "vision_tower_lr": None},
    }.items():
        run.main(flags(2, mixed, tmp_path / name, **STANDING | parts | changes))
        loaded, processor = sqllava.load(tmp_path / name, dtype="float32")
        state = loaded.state_dict()
        for key, value in expected.state_dict().items():
            assert torch.allclose(state[key], value, atol=1e-6), (name, key)
    run.main(flags(2, mixed, tmp_path / "moved", **parts))
    moved = sqllava.load(tmp_path / "moved", dtype="float32")[0].state_dict()
    assert any(not torch.equal(moved[k], v) for k, v in expected.state_dict().items())


def test_training_starts_from_a_published_stage1(mixed, tmp_path):
    """The folder, or the path of its mm_projector.bin as users' scripts have it."""
    source = GOLDEN / "sqllava-pretrain"
    wanted = {our_name(n): v for n, v in read_tensors(source / "mm_projector.bin").items()}
    for given in (source, source / "mm_projector.bin"):
        output = tmp_path / given.name
        changes = STANDING | {"pretrain_mm_mlp_adapter": given, "num_latents": 256}
        run.main(flags(2, mixed, output, **changes))
        state = load_file(output / "adapter_model.safetensors")
        for name, value in wanted.items():
            assert torch.equal(state[f"base_model.model.{name}"], value)
        tower = [key for key in state if "vision_tower" in key and "lora_B" in key]
        assert tower and all(state[key].any() for key in tower), "its ViT-LoRA goes on"


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A LLaVA model as published: a Llama with a trained MLP projector in its files."""
    folder = tmp_path_factory.mktemp("llava")
    captions = write_data(folder / "captions.json", "caption", count=8)
    mlp = {"mm_projector_type": "mlp2x_gelu", "learning_rate": 1e-2, "max_steps": 1}
    alone = {"vit_lora_enable": None, "vision_tower_lr": None}
    run.main(flags(1, captions, folder / "stage1", **mlp | alone))
    convert(folder / "stage1", folder / "merged", "merged", Options(check=False))
    convert(folder / "merged", folder / "llava", "published", Options(check=False))
    return folder / "llava"


def projector_in(folder):
    """The projector's tensors in a folder of ours or as published, by one name."""
    file = next(
        f for f in ("adapter_model.safetensors", "model.safetensors") if (folder / f).exists()
    )
    state = load_file(folder / file)
    return {re.split("projector.", k)[1]: v for k, v in state.items() if "projector." in k}


@pytest.mark.parametrize(
    "changes", [{}, {"lora_enable": None, "vit_lora_enable": None, "vision_tower_lr": None}]
)
def test_a_llava_base_keeps_its_trained_projector(llava, changes, mixed, tmp_path, caplog):
    caplog.set_level("INFO", "sqllava")
    base = {"model_name_or_path": llava, "mm_projector_type": "mlp2x_gelu"}
    run.main(flags(2, mixed, tmp_path, **STANDING | base | changes))
    assert "llava (its own projector)" in caplog.text
    wanted, found = projector_in(llava), projector_in(tmp_path)
    assert wanted.keys() == found.keys() and len(wanted) == 4
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_base_whose_projector_is_another_is_never_given_one_of_chance(
    llava, mixed, tmp_path, caplog
):
    base = STANDING | {"model_name_or_path": llava}
    with pytest.raises(SystemExit, match="trained projector of type mlp2x_gelu, not cluster cen"):
        run.main(flags(2, mixed, tmp_path / "2", **base))
    captions = write_data(tmp_path / "captions.json", "caption", count=8)
    run.main(flags(1, captions, tmp_path / "1", **base))
    assert "mlp2x_gelu, not cluster centres=8 iterations=2: a new projector begins" in caplog.text
    small = tmp_path / "tower"
    CLIPVisionModel(CLIPVisionConfig(**SMALL_TOWER)).save_pretrained(small)
    shutil.copy(GOLDEN / "clip-tiny" / "preprocessor_config.json", small)
    mlp = base | {"mm_projector_type": "mlp2x_gelu", "vision_tower": small}
    with pytest.raises(SystemExit, match=r"does not fit.*\n.*\(48, 32\) in the file, \(48, 16\)"):
        run.main(flags(2, mixed, tmp_path / "3", **mlp))


def test_what_stage1_learned_is_not_left_out(mixed, tmp_path):
    given = {"pretrain_mm_mlp_adapter": GOLDEN / "sqllava-pretrain", "num_latents": 256}
    alone = {"vit_lora_enable": None, "vision_tower_lr": None}
    with pytest.raises(SystemExit, match="has a ViT-LoRA, which --vit_lora_enable False would"):
        run.main(flags(2, mixed, tmp_path, **STANDING | given | alone))
    with pytest.raises(SystemExit, match="stay as chance made it"):
        run.main(flags(2, mixed, tmp_path, **STANDING, freeze_mm_mlp_adapter=True))


def test_another_projector_begins_anew_on_a_merged_model(tmp_path):
    convert(GOLDEN / "sqllava-lora", tmp_path / "merged", "merged", Options(check=False))
    merged = str(tmp_path / "merged")
    model, _ = assemble(merged, merged, projector_type="mlp2x_gelu")
    assert model.model.multi_modal_projector[0].weight.shape == (48, 32)
    with pytest.raises(ValueError, match="ends at layer -2, where it was read, but layer -1"):
        assemble(merged, merged, select_layer=-1)
