"""Stage chains: what one stage leaves is what the next begins with, ours, published or merged."""

import pytest
import torch
from safetensors.torch import load_file
from training import GOLDEN, flags, write_data

import sqllava
from sqllava.checkpoint.convert import Options, convert
from sqllava.checkpoint.load import assemble
from sqllava.checkpoint.published import our_name
from sqllava.checkpoint.weights import read_tensors
from sqllava.train import run

# A run at this rate leaves its weights as it found them.
STANDING = {"learning_rate": 0.0, "vision_tower_lr": 0.0, "max_steps": 1}


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


def test_another_projector_begins_anew_on_a_merged_model(tmp_path):
    convert(GOLDEN / "sqllava-lora", tmp_path / "merged", "merged", Options(check=False))
    merged = str(tmp_path / "merged")
    model, _ = assemble(merged, merged, projector_type="mlp2x_gelu")
    assert model.model.multi_modal_projector[0].weight.shape == (48, 32)
    with pytest.raises(ValueError, match="ends at layer -2, where it was read, but layer -1"):
        assemble(merged, merged, select_layer=-1)
