"""Opening checkpoints: every layout by its files, every tensor accounted for, nothing unpickled."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sqllava
from sqllava.checkpoint.load import assemble, layout_of, open_adapter
from sqllava.checkpoint.parts import load_language_model, load_tower
from sqllava.checkpoint.published import our_name, published_name
from sqllava.checkpoint.weights import open_tensors, read_tensors, tensor_names

GOLDEN = Path(__file__).parent / "fixtures" / "upstream-tiny"
FILES = sorted(
    str(path.relative_to(GOLDEN)) for path in GOLDEN.rglob("*.bin") if path.parent != GOLDEN
)


@pytest.fixture(scope="module")
def config():
    model, _ = assemble(str(GOLDEN / "vicuna-tiny"), str(GOLDEN / "clip-tiny"))
    return model.config


@pytest.fixture
def copy(tmp_path):
    """A copy of the published folders, to be damaged."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "copy"))


def read_part(root, file, config):
    """Reads the part of a model that a published file belongs to."""
    folder = root / Path(file).parts[0]
    if folder.name == "vicuna-tiny":
        return load_language_model(str(folder), torch.float32, None, None)
    if folder.name == "clip-tiny":
        return load_tower(str(folder), -2, torch.float32, None)
    return open_adapter(folder, config, str(root / "clip-tiny"))


@pytest.mark.parametrize("file", FILES)
def test_a_tensor_that_is_missing_or_renamed_is_named(file, config, copy, capfd):
    path = copy / file
    tensors = read_tensors(path)
    clones = {name: value.clone() for name, value in tensors.items()}
    assert clones
    for name in clones:
        path.unlink()
        torch.save({n: v for n, v in clones.items() if n != name}, path)
        with pytest.raises(ValueError) as missing:
            read_part(copy, file, config)
        assert f"missing: {name}" in str(missing.value).replace("position_ids", "")
        renamed = name.replace("weight", "wieght").replace("bias", "bais")
        renamed = renamed if renamed != name else f"{name}_"
        torch.save({renamed if n == name else n: v for n, v in clones.items()}, path)
        with pytest.raises(ValueError) as strange:
            read_part(copy, file, config)
        assert f"unexpected: {renamed}" in str(strange.value)


@pytest.mark.parametrize("file", FILES)
def test_load_itself_fails_on_a_damaged_file(file, copy):
    path = copy / file
    tensors = {name: value.clone() for name, value in read_tensors(path).items()}
    lost = sorted(tensors)[-1]
    del tensors[lost]
    path.unlink()
    torch.save(tensors, path)
    folder = "sqllava-pretrain" if file.startswith("sqllava-pretrain") else "sqllava-lora"
    with pytest.raises(ValueError, match="missing: " + lost.replace(".", r"\.")):
        sqllava.load(copy / folder)


def test_what_is_left_out_is_reported_by_name(caplog):
    caplog.set_level("INFO", "sqllava")
    model, _ = sqllava.load(GOLDEN / "sqllava-lora", dtype="float32")
    parameters = {name for name, _ in model.named_parameters()}
    listed = set(caplog.text.replace(",", " ").split())
    for file in FILES:
        if file.startswith("sqllava-pretrain"):
            continue
        for name in tensor_names(GOLDEN / file):
            ours = our_name(name) or "model.vision_tower." + name.removeprefix("vision_model.")
            base = ours.removeprefix("base_model.model.").replace(".lora_A", "")
            assert base.replace(".lora_B", "") in parameters or name in listed, name


def test_stage1_folder_loads_with_its_base():
    model, processor = sqllava.load(GOLDEN / "sqllava-pretrain", dtype="float32")
    assert processor.conversation_template == "plain"
    projector = read_tensors(GOLDEN / "sqllava-pretrain" / "mm_projector.bin")
    state = model.state_dict()
    for name, value in projector.items():
        assert torch.equal(state[our_name(name)], value)
    base = read_tensors(GOLDEN / "clip-tiny" / "pytorch_model.bin")
    name = "encoder.layers.0.mlp.fc1.weight"
    lora = read_tensors(GOLDEN / "sqllava-pretrain" / "Vit-lora" / "adapter_model.bin")
    key = f"base_model.model.vision_tower.vision_model.{name.removesuffix('.weight')}"
    delta = lora[f"{key}.lora_B.weight"] @ lora[f"{key}.lora_A.weight"] * (8 / 4)
    expected = base[f"vision_model.{name}"] + delta
    assert torch.allclose(state[f"model.vision_tower.{name}"], expected, atol=1e-6)


def same_model(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours
    )


@pytest.fixture(scope="module")
def stage2():
    return sqllava.load(GOLDEN / "sqllava-lora", dtype="float32")[0]


def test_the_towers_lora_may_lie_in_the_adapter_or_beside_it(stage2, copy):
    folder = copy / "sqllava-lora"
    shutil.rmtree(folder / "Vit-lora")
    assert same_model(sqllava.load(folder, dtype="float32")[0], stage2)
    shutil.copytree(GOLDEN / "sqllava-lora" / "Vit-lora", folder / "Vit-lora")
    file = folder / "adapter_model.bin"
    language = {n: v.clone() for n, v in read_tensors(file).items() if "vision_tower" not in n}
    file.unlink()
    torch.save(language, file)
    assert same_model(sqllava.load(folder, dtype="float32")[0], stage2)


def test_two_different_loras_for_the_tower_need_a_word_from_the_caller(stage2, copy):
    folder = copy / "sqllava-lora"
    other = GOLDEN / "sqllava-pretrain" / "Vit-lora"
    shutil.rmtree(folder / "Vit-lora")
    shutil.copytree(other, folder / "Vit-lora")
    with pytest.raises(ValueError, match="different values.*pass vit_lora"):
        sqllava.load(folder)
    given = GOLDEN / "sqllava-lora" / "Vit-lora"
    loaded, _ = sqllava.load(folder, vit_lora=str(given), dtype="float32")
    assert same_model(loaded, stage2)


def test_a_base_with_a_projector_of_its_own_gives_way(stage2, copy, caplog):
    """As ShareGPT4V's: its type is unknown to transformers, and it holds an MLP projector."""
    base = copy / "vicuna-tiny"
    config = json.loads((base / "config.json").read_text())
    config |= {
        "model_type": "share4v",
        "architectures": ["Share4VLlamaForCausalLM"],
        "mm_vision_tower": "somewhere/else",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 32,
    }
    (base / "config.json").write_text(json.dumps(config))
    weights = {n: v.clone() for n, v in read_tensors(base / "pytorch_model.bin").items()}
    for name, shape in {"0": (48, 32), "2": (48, 48)}.items():
        weights[f"model.mm_projector.{name}.weight"] = torch.zeros(shape)
        weights[f"model.mm_projector.{name}.bias"] = torch.zeros(48)
    (base / "pytorch_model.bin").unlink()
    torch.save(weights, base / "pytorch_model.bin")
    caplog.set_level("INFO", "sqllava")
    assert same_model(sqllava.load(copy / "sqllava-lora", dtype="float32")[0], stage2)
    assert (
        "left out, as the language model alone is taken: model.mm_projector.0.bias" in caplog.text
    )


def published_model(folder, tower_inside):
    """A merged model as the published code saves it, from the golden stage-2 model."""
    model, _ = sqllava.load(GOLDEN / "sqllava-lora", dtype="float32")
    folder.mkdir()
    for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(GOLDEN / "vicuna-tiny" / file, folder)
    config = json.loads((GOLDEN / "sqllava-lora" / "config.json").read_text())
    config["mm_vision_tower"] = str(GOLDEN / "clip-tiny")
    (folder / "config.json").write_text(json.dumps(config))
    weights = {published_name(name): value for name, value in model.state_dict().items()}
    if not tower_inside:
        weights = {n: v for n, v in weights.items() if "vision_tower" not in n}
    names = sorted(weights)
    shards = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for shard, members in shards.items():
        torch.save({name: weights[name].clone() for name in members}, folder / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return model


def test_a_published_merged_model_in_shards_opens_with_the_tower_in_it(tmp_path):
    model = published_model(tmp_path / "merged", tower_inside=True)
    # The published tower keeps its last layer: here it is not there, and nothing reads it.
    opened, processor = sqllava.load(tmp_path / "merged", dtype="float32")
    assert same_model(opened, model)
    assert processor.conversation_template == "v1_sq"


def test_a_published_merged_model_takes_its_tower_from_the_config(tmp_path):
    model = published_model(tmp_path / "merged", tower_inside=False)
    opened, _ = sqllava.load(tmp_path / "merged", dtype="float32")
    expected = model.state_dict()
    tower = read_tensors(GOLDEN / "clip-tiny" / "pytorch_model.bin")
    for name, value in opened.state_dict().items():
        if "vision_tower" in name:
            wanted = tower["vision_model." + name.removeprefix("model.vision_tower.")]
        else:
            wanted = expected[name]
        assert torch.equal(value, wanted), name


def test_parts_come_out_of_a_model_whose_language_model_is_deeper_than_its_tower(config, tmp_path):
    config.text_config.num_hidden_layers = 5
    torch.manual_seed(0)
    model = sqllava.SQLlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    tower = load_tower(str(tmp_path), -2, torch.float32, None)
    language = load_language_model(str(tmp_path), torch.float32, None, None)
    config.text_config.num_hidden_layers = 2
    pairs = [(tower, model.model.vision_tower), (language.model, model.model.language_model)]
    for loaded, saved in pairs:
        assert same_model(loaded, saved)


def test_a_missing_base_or_tower_says_what_to_pass(copy):
    shutil.rmtree(copy / "vicuna-tiny")
    with pytest.raises(FileNotFoundError, match="base 'vicuna-tiny'.*pass base="):
        sqllava.load(copy / "sqllava-lora")
    base = str(GOLDEN / "vicuna-tiny")
    shutil.rmtree(copy / "clip-tiny")
    with pytest.raises(FileNotFoundError, match="vision_tower 'clip-tiny'.*pass vision_tower="):
        sqllava.load(copy / "sqllava-lora", base=base)
    sqllava.load(copy / "sqllava-lora", base=base, vision_tower=str(GOLDEN / "clip-tiny"))


def test_a_folder_is_what_its_files_say_whatever_its_name(copy, tmp_path):
    assert layout_of(copy / "sqllava-lora") == "published adapter"
    plain = tmp_path / "weights"
    (copy / "sqllava-lora").rename(plain)
    assert layout_of(plain) == "published adapter"
    named_lora = tmp_path / "vicuna-lora-llava"
    (copy / "sqllava-pretrain").rename(named_lora)
    assert layout_of(named_lora) == "published projector"
    with pytest.raises(ValueError, match="a model of type 'llama', not an SQ-LLaVA"):
        layout_of(GOLDEN / "vicuna-tiny")
    with pytest.raises(FileNotFoundError, match="no config.json"):
        layout_of(tmp_path / "nothing")


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("form", ["zip", "pickle"])
@pytest.mark.parametrize(
    "file", [f for f in FILES if not f.startswith("sqllava-pretrain/Vit-lora")]
)
def test_code_in_a_bin_file_never_runs(file, form, copy, tmp_path):
    marker = tmp_path / "was-here"
    tensors = {n: v.clone() for n, v in read_tensors(copy / file).items()}
    tensors["evil"] = Malicious(marker)
    (copy / file).unlink()
    if form == "zip":
        torch.save(tensors, copy / file)
    else:
        (copy / file).write_bytes(pickle.dumps(tensors))
    folder = "sqllava-pretrain" if file.startswith("sqllava-pretrain") else "sqllava-lora"
    with pytest.raises((ValueError, pickle.UnpicklingError), match=r"refused|weights_only|Weights"):
        sqllava.load(copy / folder)
    assert not marker.exists()
    # The file is a working attack: a plain torch.load would have run it.
    torch.load(copy / file, weights_only=False) if form == "zip" else pickle.loads(
        (copy / file).read_bytes()
    )
    assert marker.exists()


def test_our_adapter_with_a_tensor_missing_is_refused_by_name(stage2, tmp_path):
    from sqllava.checkpoint.convert import convert

    convert(GOLDEN / "sqllava-lora", tmp_path / "ours", "ours")
    file = tmp_path / "ours" / "adapter_model.safetensors"
    state = load_file(file)
    lost = sorted(state)[5]
    del state[lost]
    save_file(state, file)
    with pytest.raises(ValueError, match="missing: " + lost.replace(".", r"\.")):
        sqllava.load(tmp_path / "ours")


def test_a_damaged_safetensors_file_is_named(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\x10\0\0\0\0\0\0\0 not a header")
    with (
        pytest.raises(ValueError, match="model.safetensors is not a safetensors"),
        open_tensors(file),
    ):
        pass
