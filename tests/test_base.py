"""An adapter over another base than its own: refused where ids do not fit, else a warning."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from training import flags, write_data
from transformers import AutoModelForCausalLM, AutoTokenizer

import sqllava
from sqllava.checkpoint import stamp
from sqllava.checkpoint.base import fingerprint
from sqllava.checkpoint.convert import Options, convert
from sqllava.checkpoint.load import load_base
from sqllava.train import run


@pytest.fixture(scope="module")
def trained(golden, tmp_path_factory):
    """A base, a tower, and an adapter that a run has left over them."""
    folder = tmp_path_factory.mktemp("base")
    for part in ("vicuna-tiny", "clip-tiny"):
        shutil.copytree(golden / part, folder / part)
    data = write_data(folder / "data.json", "image", count=4)
    base = {"model_name_or_path": folder / "vicuna-tiny", "vision_tower": folder / "clip-tiny"}
    run.main(flags(2, data, folder / "adapter", max_steps=1, **base))
    return folder


def resized(trained, folder, tokens):
    """The base with tokens added and its embeddings resized; all old rows are there."""
    source = trained / "vicuna-tiny"
    model = AutoModelForCausalLM.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(tokens)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_base_with_another_vocabulary_is_refused(trained, tmp_path):
    other = resized(trained, tmp_path / "lm", ["<pad>"])
    ways = [
        lambda: sqllava.load(trained / "adapter", base=other),
        lambda: load_base(trained / "adapter", base=other),
        lambda: convert(
            trained / "adapter", tmp_path / "merged", "merged", Options(base=other, check=False)
        ),
    ]
    for way in ways:
        with pytest.raises(ValueError, match=r"trained with 1345 as the id of <image>, .* is 1346"):
            way()
    assert not (tmp_path / "merged").exists()


def test_a_base_whose_tokens_changed_places_is_refused(trained, tmp_path):
    """As many tokens as before, and <image> where it was."""
    folder = tmp_path / "adapter"
    shutil.copytree(trained / "adapter", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    file = folder / "tokenizer.json"
    words = json.loads(file.read_text())
    vocab = words["model"]["vocab"]
    one, two = [t for t in tokenizer.get_vocab() if t.startswith("▁") and len(t) > 3][:2]
    if isinstance(vocab, dict):
        vocab[one], vocab[two] = vocab[two], vocab[one]
    else:
        at = {entry[0]: number for number, entry in enumerate(vocab)}
        vocab[at[one]][0], vocab[at[two]][0] = two, one
    file.write_text(json.dumps(words))
    with pytest.raises(ValueError, match="of its tokens 2 have another id.*▁"):
        sqllava.load(folder)


def test_a_base_of_other_weights_is_said_to_be_one(trained, tmp_path, caplog):
    sqllava.load(trained / "adapter")
    assert "was trained on another" not in caplog.text
    folder = tmp_path / "vicuna"
    shutil.copytree(trained / "vicuna-tiny", folder)
    file = folder / "pytorch_model.bin"
    weights = {n: v.clone() for n, v in torch.load(file, weights_only=True).items()}
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] += 1e-3
    file.unlink()
    torch.save(weights, file)
    sqllava.load(trained / "adapter", base=str(folder))
    assert f"was trained on another language model than {folder}" in caplog.text
    caplog.clear()
    tower = tmp_path / "clip"
    shutil.copytree(trained / "clip-tiny", tower)
    weights = {n: v * 1.01 for n, v in torch.load(tower / "pytorch_model.bin").items()}
    (tower / "pytorch_model.bin").unlink()
    torch.save(weights, tower / "pytorch_model.bin")
    options = Options(vision_tower=str(tower), check=False)
    convert(trained / "adapter", tmp_path / "merged", "merged", options)
    assert f"was trained on another vision tower than {tower}" in caplog.text


def test_stage2_says_that_stage1_had_another_base(trained, golden, tmp_path, caplog):
    data = write_data(tmp_path / "data.json", "image", count=4)
    tower = tmp_path / "clip"
    shutil.copytree(trained / "clip-tiny", tower)
    weights = {n: v * 1.01 for n, v in torch.load(tower / "pytorch_model.bin").items()}
    (tower / "pytorch_model.bin").unlink()
    torch.save(weights, tower / "pytorch_model.bin")
    captions = write_data(tmp_path / "captions.json", "caption", count=4)
    run.main(flags(1, captions, tmp_path / "stage1", max_steps=1))
    stage1 = {"pretrain_mm_mlp_adapter": tmp_path / "stage1", "vision_tower": tower}
    run.main(flags(2, data, tmp_path / "stage2", max_steps=1, **stage1))
    assert f"was trained on another vision tower than {tower}" in caplog.text


def test_a_large_file_is_known_by_its_pieces(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(stamp, "_READ_WHOLE", 1000)
    monkeypatch.setattr(stamp, "_SAMPLE", 64)
    shutil.copy(trained / "vicuna-tiny" / "config.json", tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(4096.0)}, file)
    before = fingerprint(str(tmp_path))
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    after = fingerprint(str(tmp_path))
    assert before != after == fingerprint(str(tmp_path))
