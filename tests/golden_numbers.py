"""The numbers of the published code, as one check that any form of the same model must pass."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sqllava.conversation import get_template
from sqllava.encoding import encode_record

GOLDEN = Path(__file__).parent / "fixtures" / "upstream-tiny"
NUMBERS = load_file(GOLDEN / "numbers.safetensors")
FACTS = json.loads((GOLDEN / "golden.json").read_text())


def image(name):
    return Image.open(GOLDEN / "images" / name).convert("RGB")


@torch.no_grad()
def check_golden(model, processor):
    """Pixel values, tower and projected features, logits, greedy ids and the batch's loss."""
    pixels = torch.stack([processor.prepare_image(image(f"{i}.png")) for i in range(4)])
    assert torch.allclose(pixels, NUMBERS["pixel_values_pad"], atol=1e-4)
    tower = model.model.vision_tower(pixels).last_hidden_state[:, 1:]
    assert torch.allclose(tower, NUMBERS["tower_features"], atol=1e-4)
    projected = torch.stack(model.model.get_image_features(pixels).pooler_output)
    assert torch.allclose(projected, NUMBERS["projected"], atol=1e-4)
    for number, prompt in enumerate(FACTS["prompts"]):
        inputs = processor(images=image(prompt["image"]), text=prompt["prompt"])
        logits = model(**inputs).logits[0]
        fourth = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[3].item()
        for place, name in ((-1, "last_logits"), (fourth, "image0_logits")):
            assert torch.allclose(logits[place], NUMBERS[f"prompt{number}_{name}"], atol=1e-4)
        ids = model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        assert ids[0, inputs["input_ids"].shape[1] :].tolist() == prompt["greedy_ids"]
    assert batch_loss(model, processor) == pytest.approx(FACTS["batch_loss"]["loss"], abs=1e-4)


def batch_loss(model, processor):
    """The loss of the golden batch: right-padded rows, each with its image."""
    expected = FACTS["batch_loss"]
    records = {r["id"]: r for r in json.loads((GOLDEN / "conversations.json").read_text())}
    chosen = [records[name] for name in expected["ids"]]
    encoded = [
        encode_record(
            record,
            get_template("v1_sq"),
            processor.tokenizer,
            sq_r=expected["sq_r"],
            image_tokens=processor.image_tokens,
        )
        for record in chosen
    ]
    length = max(len(one.input_ids) for one in encoded)
    ids = torch.zeros(len(encoded), length, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(encoded):
        size = len(one.input_ids)
        ids[row, :size], labels[row, :size] = map(torch.tensor, (one.input_ids, one.labels))
        mask[row, :size] = 1
    pictures = [image(record["image"]) for record in chosen if "image" in record]
    pixels = torch.stack([processor.prepare_image(picture) for picture in pictures])
    return model(input_ids=ids, attention_mask=mask, labels=labels, pixel_values=pixels).loss.item()
