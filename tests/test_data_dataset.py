"""Samples and batches: addresses of randomness, policies for bad records, padding."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from sqllava.data import dataset as dataset_module
from sqllava.data.collate import Collator
from sqllava.data.dataset import InstructionDataset, Sample, SampleKey
from sqllava.data.index import open_index
from sqllava.data.records import RecordError
from sqllava.encoding import IGNORE_INDEX, encode_record, image_token_id
from sqllava.pixels import ImagePreparer

IMAGE_TOKENS = 4


def prepare_image(image: Image.Image) -> torch.Tensor:
    pixels = np.asarray(image.resize((6, 6)), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def record(number: int, exchanges: int = 3, **changes) -> dict:
    mark = "<image>\n" if number % 2 == 0 else ""
    turns = []
    for i in range(exchanges):
        question = {"from": "human", "value": f"{mark if i == 0 else ''}What is it, {number}, {i}?"}
        turns += [question, {"from": "gpt", "value": f"It is a dog, {i}."}]
    image = {"image": f"{number}.png"} if mark else {}
    return {"id": f"id{number}", **image, "conversations": turns, **changes}


@pytest.fixture
def make(tmp_path, tokenizer):
    """Writes records with their images (even numbers have one) and gives the dataset."""
    images = tmp_path / "images"
    images.mkdir()

    def build(records, **options):
        for number in range(0, len(records), 2):
            colour = (number * 20 % 256, 10, 200)
            Image.new("RGB", (12, 8), colour).save(images / f"{number}.png")
        path = tmp_path / f"data{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps(records))
        settings = {
            "image_folder": images,
            "tokenizer": tokenizer,
            "prepare_image": prepare_image,
            "template": "v1_sq",
            "image_tokens": IMAGE_TOKENS,
            "max_length": 512,
        }
        return InstructionDataset(open_index(path), **{**settings, **options})

    return build


def same(one: Sample, other: Sample) -> bool:
    if (one.pixel_values is None) != (other.pixel_values is None):
        return False
    pixels = one.pixel_values is None or torch.equal(one.pixel_values, other.pixel_values)
    return (
        pixels
        and torch.equal(one.input_ids, other.input_ids)
        and torch.equal(one.labels, other.labels)
        and one.index == other.index
    )


def test_a_sample_is_the_record_encoded(make, tokenizer):
    records = [record(number) for number in range(4)]
    dataset = make(records)
    assert len(dataset) == 4
    for number, expected in enumerate(records):
        encoded = encode_record(expected, "v1_sq", tokenizer, image_tokens=IMAGE_TOKENS)
        sample = dataset[number]
        assert sample.input_ids.tolist() == encoded.input_ids
        assert sample.labels.tolist() == encoded.labels
        assert sample.input_ids.dtype == sample.labels.dtype == torch.long
        assert (sample.index, sample.dropped_turns, sample.skipped) == (number, 0, None)
    pixels = dataset[0].pixel_values
    assert pixels.shape == (1, 3, 6, 6) and pixels.dtype == torch.float32
    assert dataset[1].pixel_values is None


def test_draws_have_an_address(make):
    records = [record(number, exchanges=8) for number in range(6)]
    dataset, again = make(records, sq_r=0.5), make(records, sq_r=0.5)
    other_seed = make(records, sq_r=0.5, seed=1)
    keys = [SampleKey(epoch, index) for epoch in range(3) for index in (0, 2, 4)]
    samples = {key: dataset[key] for key in keys}
    for key in reversed(keys):
        assert same(samples[key], again[key])
    labels = {tuple(sample.labels.tolist()) for sample in samples.values()}
    assert len(labels) > 5
    assert any(not same(samples[key], other_seed[key]) for key in keys)
    assert same(dataset[2], samples[SampleKey(0, 2)])


def test_workers_agree_with_the_main_process(make):
    dataset = make([record(number, exchanges=8) for number in range(6)], sq_r=0.5)
    keys = [SampleKey(epoch, index) for epoch in range(2) for index in range(6)]
    loader = DataLoader(
        dataset, sampler=keys, batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    for key, sample in zip(keys, loader, strict=True):
        assert same(sample, dataset[key])


def test_it_pickles_for_spawned_workers(make):
    dataset = make([record(number) for number in range(3)], sq_r=0.5)
    copied = pickle.loads(pickle.dumps(dataset))
    assert same(copied[SampleKey(1, 2)], dataset[SampleKey(1, 2)])


def bad_data() -> list[dict]:
    """Records of which only 0, 1 and 8 are good."""
    records = [record(number) for number in range(9)]
    records[2]["image"] = "missing.png"
    records[3]["conversations"].reverse()
    records[4]["conversations"] = []
    records[5] = {"id": "id5"}
    records[6]["image"] = "../escape.png"
    records[7]["image"] = "7.png"
    return records


REASONS = {
    2: "'missing.png' not found",
    3: "turn 0 must come from 'human'",
    4: "pairs",
    5: "'conversations' must be a list",
    6: "leads out",
    7: "0 <image> marks",
}


def test_fail_names_file_number_id_and_reason(make):
    dataset = make(bad_data())
    for number, reason in REASONS.items():
        where = rf"data\d\.json: record {number} \(id 'id{number}'\): .*{reason}"
        with pytest.raises(RecordError, match=where):
            dataset[number]
    assert dataset[8].skipped is None


def test_failures_cross_from_the_workers(make):
    loader = DataLoader(make(bad_data()), batch_size=None, num_workers=1, sampler=[2])
    with pytest.raises(RecordError, match=r"record 2 \(id 'id2'\)"):
        list(loader)


def test_skip_keeps_the_batch_shape_and_says_why(make):
    dataset = make(bad_data(), bad_samples="skip")
    for number, reason in REASONS.items():
        sample = dataset[number]
        assert sample.labels.tolist() == [IGNORE_INDEX] and len(sample.input_ids) == 1
        assert sample.pixel_values is None and sample.index == number
        assert f"record {number} " in sample.skipped and reason in sample.skipped
    batch = Collator(0)([dataset[number] for number in range(9)])
    assert batch["input_ids"].shape[0] == 9
    assert [number for number, _ in batch["sample_stats"]["skipped"]] == list(REASONS)


def test_a_strip_beyond_the_bounds_is_skipped_and_one_within_is_used(make):
    clip = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    processors = {pad: LlavaImageProcessorPil(**clip, do_pad=pad) for pad in (True, False)}
    names = ("long.png", "strip.png")
    records = [record(0), record(2, image="long.png"), record(4, image="strip.png")]
    for pad, processor in processors.items():
        prepare = ImagePreparer(processor)
        dataset = make(records, prepare_image=prepare, bad_samples="skip")
        Image.new("1", (70_000, 1)).save(dataset.image_folder / names[0])
        Image.new("1", (65_000, 1)).save(dataset.image_folder / names[1])
        assert "side of more than 65535" in dataset[1].skipped
        if pad:
            assert dataset[2].skipped is None and dataset[2].pixel_values.shape == (1, 3, 56, 56)
        else:
            assert "record 2 " in dataset[2].skipped and "too thin" in dataset[2].skipped


def test_replace_takes_the_next_of_the_same_modality(make):
    dataset = make(bad_data(), bad_samples="replace")
    for number, other in {2: 8, 4: 8, 6: 8, 3: 1, 5: 1}.items():
        sample = dataset[number]
        assert torch.equal(sample.input_ids, dataset[other].input_ids)
        assert sample.index == number
        assert sample.skipped.endswith(f"replaced by record {other}")
        assert same(sample, dataset[number])


def test_replace_takes_the_other_modality_if_it_must(make):
    dataset = make([record(0, image="missing.png"), record(1)], bad_samples="replace")
    assert dataset[0].skipped.endswith("replaced by record 1")
    nothing = make([record(0, image="missing.png")] * 3, bad_samples="replace")
    with pytest.raises(RecordError, match="none of the 2 records"):
        nothing[0]


def test_a_sample_without_a_target_is_never_silent(make):
    dataset = make([record(0, exchanges=1)], max_length=IMAGE_TOKENS + 5)
    with pytest.raises(RecordError, match="beyond the maximum length"):
        dataset[0]
    assert "maximum length" in make([record(0)], max_length=9, bad_samples="skip")[0].skipped


def test_images_of_dropped_turns_are_left_out(make, tokenizer):
    long = record(0, exchanges=4, image=["0.png", "2.png"])
    long["conversations"][6]["value"] = "<image>\nAnd this one?"
    dataset = make([long, record(1), record(2)], template="v1")
    whole = dataset[0]
    assert len(whole.pixel_values) == 2
    dataset.max_length = len(whole.input_ids) - 1
    cut = dataset[0]
    assert cut.dropped_turns == 2
    assert (cut.input_ids == image_token_id(tokenizer)).sum() == IMAGE_TOKENS
    assert torch.equal(cut.pixel_values, whole.pixel_values[:1])


def test_captions(make):
    dataset = make([record(0, exchanges=1), record(1, exchanges=1)], template="plain")
    assert dataset[0].input_ids[1 : 1 + IMAGE_TOKENS].unique().numel() == 1
    with pytest.raises(RecordError, match=r"record 1 .*one image and one caption"):
        dataset[1]


def test_images_need_a_folder(make):
    dataset = make([record(0), record(1)], image_folder=None)
    assert dataset[1].skipped is None
    with pytest.raises(RecordError, match="no image folder"):
        dataset[0]


def test_an_unknown_policy_is_refused(make):
    with pytest.raises(ValueError, match="bad_samples must be one of"):
        make([record(0)], bad_samples="ignore")


def test_lengths_and_modality(make):
    dataset = make([record(0), record(1), record(2, exchanges=9)], max_length=50)
    assert dataset.has_image.tolist() == [True, False, True]
    lengths = dataset.lengths
    assert lengths.dtype == np.int32 and lengths[2] == 50 and lengths[0] > lengths[1]


def sample(length: int, images: int = 0, **changes) -> Sample:
    ids = torch.arange(1, length + 1)
    labels = ids.clone()
    labels[0] = IGNORE_INDEX
    pixels = torch.full((images, 3, 2, 2), float(length)) if images else None
    return Sample(ids, labels, pixels, **{"index": length, **changes})


def test_a_batch_is_padded_on_the_right():
    # 1 is a token of the texts too: padding is told by length alone.
    batch = Collator(pad_token_id=1)([sample(3, 1), sample(5), sample(2, 2, dropped_turns=4)])
    assert batch["input_ids"].tolist()[0] == [1, 2, 3, 1, 1]
    assert batch["labels"].tolist()[0] == [IGNORE_INDEX, 2, 3, IGNORE_INDEX, IGNORE_INDEX]
    assert batch["attention_mask"].sum(1).tolist() == [3, 5, 2]
    assert batch["attention_mask"].tolist()[2] == [1, 1, 0, 0, 0]
    assert {batch[key].dtype for key in ("input_ids", "labels", "attention_mask")} == {torch.long}
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [3.0, 2.0, 2.0]
    assert batch["sample_stats"] == {
        "tokens": 10,
        "computed": 15,
        "padding": 5,
        "pairs": 6 + 15 + 3,
        "supervised": 7,
        "images": 3,
        "images_of_records": 3,
        "dropped_turns": 4,
        "skipped": [],
        "indices": [3, 5, 2],
    }


def test_a_batch_without_images_has_no_pixels():
    batch = Collator(0, pad_to_multiple_of=8)([sample(3), sample(9)])
    assert "pixel_values" not in batch
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 16)
    assert batch["attention_mask"].shape == (2, 16) and batch["sample_stats"]["padding"] == 20


def test_an_image_is_read_once_for_records_that_follow_each_other(make, monkeypatch):
    read = []
    real = dataset_module.load_image
    monkeypatch.setattr(
        dataset_module,
        "load_image",
        lambda path, **how: read.append(path.name) or real(path, **how),
    )
    dataset = make([record(0), record(4, image="0.png"), record(2)])
    first, second, other = (dataset[number] for number in range(3))
    assert read == ["0.png", "2.png"]
    assert torch.equal(first.pixel_values, second.pixel_values)
    assert first.images == second.images == ("0.png",) and other.images == ("2.png",)
