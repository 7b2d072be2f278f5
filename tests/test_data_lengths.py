"""True lengths: counted once, told apart by what they depend on, used by the dataset."""

import json

import numpy as np
import pytest
from training import GOLDEN

from sqllava.data.cli import main
from sqllava.data.dataset import InstructionDataset
from sqllava.data.index import open_index
from sqllava.data.lengths import Measure, count_lengths, known_lengths
from sqllava.encoding import encode_record


@pytest.fixture
def index(tmp_path, golden_records):
    records = [*golden_records.values(), {"id": "bad"}, 7, {"conversations": 5}] * 40
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    return open_index(path)


@pytest.fixture
def measure(tokenizer):
    return Measure(tokenizer, "v1_sq", 16)


@pytest.mark.parametrize("jobs", [1, 2])
def test_lengths_are_those_of_the_encoding(index, measure, tokenizer, jobs):
    lengths = count_lengths(index, measure, jobs)
    assert lengths.dtype == np.int32 and len(lengths) == len(index)
    for number in range(0, len(index), 7):
        record = index[number]
        if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
            assert lengths[number] == 0
            continue
        encoded = encode_record(record, "v1_sq", tokenizer, image_tokens=16)
        assert lengths[number] == len(encoded.input_ids)


def test_they_are_counted_once_for_each_template_and_tower(index, measure, tokenizer):
    assert known_lengths(index, measure) is None
    first = np.array(count_lengths(index, measure))
    known = known_lengths(index, measure)
    assert isinstance(known, np.memmap) and np.array_equal(known, first)
    others = [Measure(tokenizer, "v1", 16), Measure(tokenizer, "v1_sq", 576)]
    assert len({one.key for one in (measure, *others)}) == 3
    assert all(known_lengths(index, other) is None for other in others)
    assert (count_lengths(index, others[1]) >= first).all()
    index.source.write_text(index.source.read_text() + "\n")
    assert known_lengths(open_index(index.source), measure) is None


def test_the_dataset_uses_them_where_there_are_any(index, measure, tokenizer):
    def dataset():
        return InstructionDataset(index, None, tokenizer, lambda image: image, "v1_sq", 16, 300)

    estimated = dataset().lengths
    counted = np.minimum(count_lengths(index, measure), 300)
    assert np.array_equal(dataset().lengths, counted)
    assert not np.array_equal(estimated, counted)


def test_the_command_makes_the_index_and_counts(index, capsys):
    words = ["index", str(index.source), "--model", str(GOLDEN / "vicuna-tiny"), "--jobs", "1"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"{len(index)} records, {(index.images > 0).sum()} of them with images" in shown
    assert "tokens, median" in shown
    assert len(list(index.path.parent.glob("*.lengths-*.npy"))) == 1
