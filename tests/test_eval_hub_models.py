"""transformers' own models under `sqllava eval run`: batches of those whose processors want more,
and paths, ids and packages that are not there.
"""

import json
from pathlib import Path

import pytest
import torch
from eval_data import GOLDEN, read, write_gqa
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from sqllava.eval import cli
from sqllava.eval.engine import HubPrompter, open_engine

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<boi>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %} model:"
)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A tiny Gemma 3 of random weights: its template writes <bos>, its inputs have token types."""
    folder = tmp_path_factory.mktemp("models") / "tiny-gemma3"
    marks = {"image_token": "<soft>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "vicuna-tiny", extra_special_tokens=marks)
    tokenizer.pad_token = tokenizer.unk_token
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    Gemma3Processor(images, tokenizer, chat_template=TEMPLATE, image_seq_length=4).save_pretrained(
        folder
    )
    config = Gemma3Config(
        text_config=SIZES
        | {"vocab_size": len(tokenizer), "num_attention_heads": 2, "num_key_value_heads": 1}
        | {"head_dim": 16, "max_position_embeddings": 512},
        vision_config=SIZES | {"num_attention_heads": 2, "image_size": 28, "patch_size": 7},
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim == 2:
                weights.mul_(8.0)
    model.save_pretrained(folder)
    return folder


def test_gemma_3_answers_a_batch_as_it_answers_alone(gemma, tmp_path):
    write_gqa(tmp_path)
    folder, said = tmp_path / "gqa", []
    rows = read(folder / "llava_gqa_testdev_balanced.jsonl")
    del rows[1]["image"]  # one question without a picture, in a batch with others
    questions = tmp_path / "q.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for size in (1, 4):
        answers = tmp_path / f"{size}.jsonl"
        cli.main(
            ["run", "gqa", "--model", str(gemma), "--questions", str(questions)]
            + ["--images", str(folder / "data/images"), "--answers", str(answers)]
            + ["--max-new-tokens", "6", "--workers", "0", "--batch-size", str(size)]
        )
        said.append([row["text"] for row in read(answers)])
    assert said[0] == said[1] and len(set(said[0])) > 1


def test_a_template_that_writes_the_first_token_gets_no_second_one(gemma):
    processor = Gemma3Processor.from_pretrained(gemma)
    ids = HubPrompter(processor).batch(["What?"], [None])["input_ids"][0].tolist()
    assert ids.count(processor.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("path", ["runs/none/here", "./none", "/none", __file__])
def test_a_model_that_is_not_there_is_named(path, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no model folder {path}"):
        open_engine(path)


def test_a_hub_id_that_cannot_be_fetched_is_one_sentence(monkeypatch):
    from transformers import AutoConfig

    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to the hub.\nCheck your internet connection.")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(ValueError) as error:
        open_engine("someone/model")
    assert str(error.value).startswith("someone/model: We couldn't connect to the hub")
    assert "\n" not in str(error.value) and "a model is a folder" in str(error.value)


def test_a_package_that_a_model_needs_is_named(gemma, monkeypatch):
    from transformers import AutoProcessor

    def lacking(*args, **kwargs):
        raise ImportError(
            "\nAVideoProcessor requires the Torchvision library but it was not\nfound."
        )

    monkeypatch.setattr(AutoProcessor, "from_pretrained", lacking)
    with pytest.raises(ValueError, match=r"requires the Torchvision .*pip install torchvision\)$"):
        open_engine(str(gemma))


def test_a_config_that_is_none_is_named(tmp_path):
    Path(tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config.json: expected an object"):
        open_engine(str(tmp_path))
