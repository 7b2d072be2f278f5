"""The whole model against the numbers of the published code, and what its forward promises."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sqllava.checkpoint.load import assemble, load
from sqllava.checkpoint.stage1 import read_stage1
from sqllava.conversation import Turn
from sqllava.data.collate import Collator
from sqllava.data.dataset import InstructionDataset
from sqllava.data.index import open_index
from sqllava.encoding import encode_text
from sqllava.model.adapters import Lora, Training, load_adapter_state, prepare_training


@pytest.fixture(scope="module")
def published(golden):
    """The published stage-2 model, its LoRAs merged, in our classes."""
    return load(golden / "sqllava-lora", dtype=torch.float32)


@pytest.fixture(scope="module")
def numbers(golden):
    return load_file(golden / "numbers.safetensors")


def _image(golden, name):
    return Image.open(golden / "images" / name).convert("RGB")


def test_pixel_values_equal_the_published_ones(published, numbers, golden):
    _, processor = published
    for i, expected in enumerate(numbers["pixel_values_pad"]):
        assert torch.equal(processor.prepare_image(_image(golden, f"{i}.png")), expected)


@torch.no_grad()
def test_image_features_equal_the_published_ones(published, numbers):
    model, _ = published
    pixel_values = numbers["pixel_values_pad"]
    tower = model.model.vision_tower(pixel_values).last_hidden_state[:, 1:]
    assert torch.allclose(tower, numbers["tower_features"], atol=1e-4)
    projected = torch.stack(model.model.get_image_features(pixel_values).pooler_output)
    assert torch.allclose(projected, numbers["projected"], atol=1e-4)


@torch.no_grad()
def test_logits_and_greedy_ids_equal_the_published_ones(published, numbers, golden_json, golden):
    model, processor = published
    for i, prompt in enumerate(golden_json["prompts"]):
        inputs = processor(images=_image(golden, prompt["image"]), text=prompt["prompt"])
        logits = model(**inputs).logits[0]
        image_at = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[3]
        assert torch.allclose(logits[-1], numbers[f"prompt{i}_last_logits"], atol=1e-4)
        assert torch.allclose(logits[image_at[0]], numbers[f"prompt{i}_image0_logits"], atol=1e-4)
        ids = model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        generated = ids[0, inputs["input_ids"].shape[1] :].tolist()
        assert generated == prompt["greedy_ids"]


@torch.no_grad()
def test_batch_loss_equals_the_published_one(
    published, golden_json, golden_records, golden, tmp_path
):
    model, processor = published
    expected = golden_json["batch_loss"]
    data = tmp_path / "batch.json"
    data.write_text(json.dumps([golden_records[name] for name in expected["ids"]]))
    dataset = InstructionDataset(
        open_index(data),
        golden / "images",
        processor.tokenizer,
        processor.prepare_image,
        "v1_sq",
        processor.image_tokens,
        2048,
        sq_r=expected["sq_r"],
    )
    batch = Collator(processor.tokenizer.pad_token_id)([dataset[i] for i in range(len(dataset))])
    batch.pop("sample_stats")
    assert model(**batch).loss.item() == pytest.approx(expected["loss"], abs=1e-4)
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    full = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    )
    assert model(**batch).loss.item() == pytest.approx(full.item(), abs=1e-5)


def test_published_stage1_is_read_under_our_names(golden):
    model, _ = assemble(str(golden / "vicuna-tiny"), str(golden / "clip-tiny"))
    trained = prepare_training(model, Training(vision_lora=Lora(4, 8)))
    stage1 = read_stage1(golden / "sqllava-pretrain" / "mm_projector.bin", model.config)
    assert stage1.vision_lora == Lora(4, 8)
    load_adapter_state(trained, stage1.state, ("projector", "vision tower"), "sqllava-pretrain")
    given = torch.load(golden / "sqllava-pretrain" / "mm_projector.bin", weights_only=True)
    projector = trained.get_base_model().model.multi_modal_projector.modules_to_save["default"]
    assert torch.equal(projector.mlp[0].weight, given["model.mm_projector.mlp.0.weight"])


def test_images_and_placeholders_must_match(published, golden):
    model, processor = published
    inputs = processor(images=_image(golden, "0.png"), text="<image>\nWhat is shown?")
    inputs["pixel_values"] = inputs["pixel_values"].repeat(2, 1, 1, 1)
    with pytest.raises(ValueError, match="16 image placeholders.*32 features"):
        model(**inputs)
    with pytest.raises(ValueError, match="2 <image> marks, but 1 images"):
        processor(images=_image(golden, "0.png"), text="<image> <image>")


def test_a_batch_without_images_runs_the_tower_and_leaves_no_trace(published, golden):
    model, processor = published
    ids = torch.tensor([encode_text("USER: Hi ASSISTANT: Hello</s>", processor.tokenizer)])
    calls = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    with_blank = model(input_ids=ids, labels=ids)
    without = model.model(input_ids=ids).last_hidden_state
    hook.remove()
    assert calls == [1]
    assert with_blank.logits is None
    full = model(input_ids=ids).logits
    expected = torch.nn.functional.cross_entropy(full[0, :-1], ids[0, 1:])
    assert with_blank.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert torch.allclose(model.lm_head(without), full)


def test_saved_model_opens_with_the_auto_classes(published, golden, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = published
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    again_processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(model) and type(again_processor) is type(processor)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in again.state_dict().items())
    inputs = processor(images=_image(golden, "1.png"), text="USER: <image>\nHi ASSISTANT:")
    inputs_again = again_processor(
        images=_image(golden, "1.png"), text="USER: <image>\nHi ASSISTANT:"
    )
    assert all(torch.equal(inputs[name], inputs_again[name]) for name in inputs)
    turns = [Turn("user", "Hi", 1), Turn("assistant", None)]
    assert processor.encode_turns(turns) == again_processor.encode_turns(turns)
