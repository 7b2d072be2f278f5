"""Conversion: every form of the golden model computes the published numbers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_numbers import GOLDEN, check_golden, image
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, CLIPVisionModel, LlamaConfig

import sqllava
from sqllava.checkpoint.cli import main
from sqllava.checkpoint.convert import Options, convert
from sqllava.checkpoint.load import layout_of, load_base
from sqllava.checkpoint.published import llama_config, published_name
from sqllava.checkpoint.weights import read_tensors, weight_names
from sqllava.model.adapters import Adapter
from sqllava.model.config import cut_vision_config

STAGE2 = GOLDEN / "sqllava-lora"
ROUTES = {
    "as it is": (),
    "ours": ("ours",),
    "merged": ("merged",),
    "ours, published": ("ours", "published"),
    "ours, published, ours": ("ours", "published", "ours"),
    "ours, merged": ("ours", "merged"),
    "merged, published": ("merged", "published"),
    "merged, published, ours": ("merged", "published", "ours"),
}


@pytest.mark.parametrize("route", ROUTES)
def test_golden_numbers_survive_conversion(route, tmp_path):
    folder = STAGE2
    for step, to in enumerate(ROUTES[route]):
        convert(folder, tmp_path / str(step), to, Options(check=False))
        folder = tmp_path / str(step)
    check_golden(*sqllava.load(folder, dtype="float32", device="cpu"))


def test_a_published_adapter_comes_back_tensor_for_tensor(tmp_path):
    """ours -> published writes every tensor under its published name; only the LoRA of the layer
    that is not read, which ours does not hold, is zero."""
    convert(STAGE2, tmp_path / "ours", "ours")
    convert(tmp_path / "ours", tmp_path / "published", "published")
    for file in ("non_lora_trainables.bin", "adapter_model.bin", "Vit-lora/adapter_model.bin"):
        back, expected = read_tensors(tmp_path / "published" / file), read_tensors(STAGE2 / file)
        if file == "adapter_model.bin":
            expected = {n: v for n, v in expected.items() if "vision_tower" not in n}
        assert back.keys() == expected.keys()
        for name, value in expected.items():
            unread = "encoder.layers.2." in name
            assert torch.equal(back[name], torch.zeros_like(value) if unread else value), name
    for file in ("adapter_config.json", "Vit-lora/adapter_config.json", "config.json"):
        back = json.loads((tmp_path / "published" / file).read_text())
        golden = json.loads((STAGE2 / file).read_text())
        if file != "config.json":
            assert back.keys() == golden.keys(), "PEFT 0.4 refuses fields that it does not know"
            assert set(back.pop("target_modules")) == set(golden.pop("target_modules"))
            for field in ("auto_mapping", "base_model_name_or_path"):
                back.pop(field), golden.pop(field)
            assert back == golden
        else:
            shared = golden.keys() & back.keys() - {"mm_vision_tower", "_name_or_path", "use_cache"}
            differing = {name for name in shared if golden[name] != back[name]}
            assert differing <= {"architectures"}


def test_our_adapter_opens_with_plain_peft(tmp_path):
    convert(STAGE2, tmp_path / "ours", "ours")
    opened = PeftModel.from_pretrained(load_base(tmp_path / "ours"), tmp_path / "ours")
    _, processor = sqllava.load(tmp_path / "ours")
    check_golden(opened.merge_and_unload().eval(), processor)


def test_a_stage1_folder_goes_both_ways(tmp_path):
    source = GOLDEN / "sqllava-pretrain"
    convert(source, tmp_path / "ours", "ours")
    convert(tmp_path / "ours", tmp_path / "published", "published")
    for file in ("mm_projector.bin", "Vit-lora/adapter_model.bin"):
        back, expected = read_tensors(tmp_path / "published" / file), read_tensors(source / file)
        assert back.keys() == expected.keys()
        kept = [name for name in expected if "layers.2." not in name]
        assert all(torch.equal(back[name], expected[name]) for name in kept)
    assert layout_of(tmp_path / "published") == "published projector"


def test_the_tower_of_a_published_model_is_one_that_transformers_opens(tmp_path):
    convert(STAGE2, tmp_path / "merged", "merged", Options(check=False))
    convert(tmp_path / "merged", tmp_path / "published", "published")
    tower = CLIPVisionModel.from_pretrained(tmp_path / "published" / "vision_tower")
    config = json.loads((tmp_path / "published" / "config.json").read_text())
    assert (config["mm_vision_tower"], config["mm_vision_select_layer"]) == ("vision_tower", -1)
    ours, processor = sqllava.load(tmp_path / "merged")
    pixels = processor.prepare_image(image("0.png"))[None]
    with torch.no_grad():
        read = tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        expected = ours.model.vision_tower(pixels).last_hidden_state[:, 1:]
    assert torch.allclose(read, expected, atol=1e-5)


def test_an_old_llava_model_converts(tmp_path):
    """LLaVA-1.5: an MLP projector, the tower named in the config, no LoRA."""
    base = shutil.copytree(GOLDEN / "vicuna-tiny", tmp_path / "llava-v1.5")
    config = json.loads((base / "config.json").read_text()) | {
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "image_aspect_ratio": "pad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": str(GOLDEN / "clip-tiny"),
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": 32,
        "mm_use_im_start_end": False,
    }
    (base / "config.json").write_text(json.dumps(config))
    weights = {n: v.clone() for n, v in read_tensors(base / "pytorch_model.bin").items()}
    torch.manual_seed(0)
    first, second = torch.nn.Linear(32, 48), torch.nn.Linear(48, 48)
    for number, layer in (("0", first), ("2", second)):
        weights[f"model.mm_projector.{number}.weight"] = layer.weight.detach()
        weights[f"model.mm_projector.{number}.bias"] = layer.bias.detach()
    (base / "pytorch_model.bin").unlink()
    torch.save(weights, base / "pytorch_model.bin")
    convert(base, tmp_path / "ours", "ours")
    model, processor = sqllava.load(tmp_path / "ours", dtype="float32")
    assert processor.conversation_template == "v1"
    with torch.no_grad():
        pixels = processor.prepare_image(image("1.png"))[None]
        tower = CLIPVisionModel.from_pretrained(GOLDEN / "clip-tiny")
        features = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        expected = second(torch.nn.functional.gelu(first(features)))
        projected = model.get_image_features(pixels).pooler_output[0]
    assert torch.allclose(projected, expected[0], atol=1e-5)
    convert(tmp_path / "ours", tmp_path / "back", "published")
    again, _ = sqllava.load(tmp_path / "back", dtype="float32")
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in again.state_dict().items())


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_second_run_changes_nothing_and_another_source_is_refused(tmp_path):
    target = tmp_path / "target"
    convert(STAGE2, target, "ours")
    before = tree(target)
    convert(STAGE2, target, "ours")
    assert tree(target) == before
    with pytest.raises(FileExistsError, match="choose another place"):
        convert(GOLDEN / "sqllava-pretrain", target, "ours")
    with pytest.raises(FileExistsError):
        convert(STAGE2, target, "merged")
    assert tree(target) == before
    convert(STAGE2, tmp_path / "twin", "ours")
    assert tree(tmp_path / "twin") == before, "the same conversion gives the same bytes"


def test_a_source_that_has_changed_is_not_taken_for_the_same(tmp_path):
    source = shutil.copytree(GOLDEN, tmp_path / "golden") / "sqllava-lora"
    convert(source, tmp_path / "target", "ours")
    (source / "non_lora_trainables.bin").touch()
    with pytest.raises(FileExistsError):
        convert(source, tmp_path / "target", "ours")


def test_a_failed_conversion_leaves_nothing(tmp_path):
    broken = shutil.copytree(GOLDEN, tmp_path / "golden")
    file = broken / "vicuna-tiny" / "pytorch_model.bin"
    weights = {n: v.clone() for n, v in read_tensors(file).items()}
    del weights["model.layers.1.mlp.up_proj.weight"]
    file.unlink()
    torch.save(weights, file)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="missing: model.language_model.layers.1.mlp.up_proj"):
        convert(broken / "sqllava-lora", out / "merged", "merged")
    assert list(out.iterdir()) == []


def test_what_a_killed_conversion_left_is_cleared_away(tmp_path):
    rest = tmp_path / ".merged.unfinished"
    rest.mkdir()
    (rest / "part-0.safetensors").write_bytes(b"half")
    convert(STAGE2, tmp_path / "merged", "merged", Options(check=False))
    assert not rest.exists()
    assert {p.suffix for p in (tmp_path / "merged").glob("part-*")} == set()


def test_merging_reports_how_far_the_logits_moved(tmp_path, capsys):
    main([str(STAGE2), str(tmp_path / "merged"), "--to", "merged"])
    printed = capsys.readouterr().out
    assert float(printed.split("unmerged: ")[1].split()[0]) < 1e-5
    main([str(STAGE2), str(tmp_path / "half"), "--to", "merged", "--dtype", "bfloat16"])
    moved = float(capsys.readouterr().out.split("unmerged: ")[1].split()[0])
    assert 1e-5 < moved < 0.1
    state = load_file(tmp_path / "half" / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    exact = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(v, exact[n].bfloat16()) for n, v in state.items()), "rounded once"


def test_a_wrong_merge_is_caught(tmp_path, monkeypatch):
    merged = Adapter.merged
    monkeypatch.setattr(
        Adapter, "merged", lambda self, name, w, dtype=None: merged(self, name, w, dtype) * 1.01
    )
    with pytest.raises(ValueError, match="changed its logits"):
        convert(STAGE2, tmp_path / "merged", "merged")
    assert not (tmp_path / "merged").exists()


def test_merged_weights_become_safetensors_shards(tmp_path):
    source = tmp_path / "bin"
    convert(STAGE2, source, "merged", Options(check=False))
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(state, source / "pytorch_model.bin")
    convert(source, tmp_path / "shards", "merged", Options(shard_bytes=200_000))
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    back = {name: load_file(file)[name] for name, file in weight_names(tmp_path / "shards").items()}
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
    check_golden(*sqllava.load(tmp_path / "shards", dtype="float32"))


def test_the_published_code_is_not_given_what_it_cannot_load(tmp_path):
    convert(STAGE2, tmp_path / "ours", "ours")
    config = tmp_path / "ours" / "config.json"
    fields = json.loads(config.read_text())
    fields["projector_options"] = {"centres": 9}
    config.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="always has 256 centres"):
        convert(tmp_path / "ours", tmp_path / "published", "published")


def test_the_shell_script_merges(tmp_path):
    script = GOLDEN.parents[2] / "scripts" / "merge_lora.sh"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment["VIRTUAL_ENV"] = str(Path(sys.executable).parent.parent)
    command = ["bash", str(script), str(STAGE2), str(tmp_path / "merged"), "--no_check"]
    subprocess.run(command, check=True, env=environment)
    assert layout_of(tmp_path / "merged") == "model"
    assert AutoConfig.from_pretrained(tmp_path / "merged").model_type == "sqllava"


# Runs in a process of its own: its peak of memory, mapped files counted in, is the conversion's.
_MEASURE = """
import re, sys
from pathlib import Path
from sqllava.checkpoint.convert import Options, convert

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = peak()
convert(sys.argv[1], sys.argv[2], "merged", Options(check=False, dtype="bfloat16"))
print(before, peak())
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_memory_stays_within_a_shard(form, tmp_path):
    """2.2 GB in two shards of float16 become bfloat16, within 1.3 times the larger shard."""
    base = shutil.copytree(GOLDEN / "vicuna-tiny", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16}
    config |= {"num_key_value_heads": 16, "num_hidden_layers": 22, "model_type": "llava"}
    config |= {"mm_projector_type": "cluster", "mm_vision_tower": str(GOLDEN / "clip-tiny")}
    config |= {"image_aspect_ratio": "pad", "torch_dtype": "float16"}
    (base / "config.json").write_text(json.dumps(config))
    (base / "pytorch_model.bin").unlink()
    names = published_shapes(config)
    halves = [sorted(names)[::2], sorted(names)[1::2]]
    weight_map = {}
    for number, half in enumerate(halves):
        state = {name: torch.full(names[name], 0.01, dtype=torch.float16) for name in half}
        stem = "model" if form == "safetensors" else "pytorch_model"
        file = f"{stem}-{number}.{form}"
        save_file(state, base / file) if form == "safetensors" else torch.save(state, base / file)
        weight_map |= dict.fromkeys(half, file)
    (base / f"{stem}.{form}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shards = [file.stat().st_size for file in base.glob(f"*model-*.{form}")]
    assert sum(shards) > 2e9
    del state
    command = [sys.executable, "-c", _MEASURE, str(base), str(tmp_path / "out")]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    before, after = map(int, result.stdout.split())
    print(f"{form}: shard {max(shards) / 1e9:.2f} GB, peak {after / 1e9:.2f} GB", end=" ")
    print(f"({before / 1e9:.2f} GB before)")
    assert after < 1.3 * max(shards)
    written = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert written > 2e9


def published_shapes(config):
    """The shapes of a published whole model without its tower, by their published names."""
    vision = cut_vision_config(AutoConfig.from_pretrained(GOLDEN / "clip-tiny"), -2)
    text = LlamaConfig.from_dict(llama_config(config))
    with torch.device("meta"):
        model = sqllava.SQLlavaForConditionalGeneration(
            sqllava.SQLlavaConfig(vision_config=vision, text_config=text)
        )
    shapes = {published_name(name): value.shape for name, value in model.state_dict().items()}
    return {name: shape for name, shape in shapes.items() if "vision_tower" not in name}
