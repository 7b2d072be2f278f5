"""The check: every fault by number and id, counts, lengths, clean copies, and the layout."""

import copy
import json
import os
import random
import string
import xml.etree.ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from training import GOLDEN

from sqllava.data import histogram
from sqllava.data.check import Examiner, check, count_folders, layout_table, table
from sqllava.data.cli import main
from sqllava.data.index import open_index
from sqllava.data.records import check_record
from sqllava.data.view import open_view
from sqllava.encoding import encode_record

MARKED = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."}]
TEXT = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello, you."}]
VIEW = open_view(None)


def examiner(file, **changes) -> Examiner:
    values = {"images": None, "decode": False, "view": VIEW, "template": "v1_sq"}
    return Examiner(file, **{**values, "sq_r": 0.5, "max_length": 2048, **changes})


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (9, 6)).save(folder / name)
    data = (folder / "b.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    return folder


@pytest.fixture
def file(tmp_path):
    records = [
        {"id": "0", "image": "a.jpg", "conversations": MARKED},
        {"id": "1", "conversations": TEXT},
        {"id": "2", "image": "none.jpg", "conversations": MARKED},
        {"id": "3", "image": "cut.jpg", "conversations": MARKED},
        {"id": "4", "image": "a.jpg", "conversations": TEXT},
        {"id": "5", "conversations": TEXT[::-1]},
        {"id": "0", "image": ["a.jpg", "b.jpg"], "conversations": [{**MARKED[0]}, MARKED[1]]},
        {"id": "7", "messages": [{"role": "user", "content": "Hi"}, {"role": "x", "content": ""}]},
        {
            "id": "0",
            "messages": [{"role": "user", "content": "<image><image>Hi"}, MARKED[1]],
            "images": ["a.jpg", "b.jpg"],
        },
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_fault_is_named_with_record_id_and_reason(file, images, jobs):
    report = check(examiner(file, images=images, decode=True), jobs)
    assert [(fault.record, fault.id) for fault in report.faults] == [
        (2, "'2'"), (3, "'3'"), (4, "'4'"), (5, "'5'"), (6, "'0'"), (7, "'7'")
    ]  # fmt: skip
    reasons = ["'none.jpg' not found", "cut.jpg", "0 <image> marks", "turn 0 must come from"]
    reasons += ["1 <image> marks", "'from' must be"]
    for fault, reason in zip(report.faults, reasons, strict=True):
        assert reason in fault.reason
    assert (report.records, report.usable, report.duplicate_ids) == (9, 3, 2)
    assert (report.text_only, report.several_images, report.images) == (1, 1, 3)
    assert report.kind == "JSON array" and report.estimated
    assert report.converted["'images' read as 'image'"] == 1
    assert report.converted["'messages' read as 'conversations'"] == 2


def test_without_decode_a_broken_image_is_not_seen_and_without_images_none_is_missed(file, images):
    found = check(examiner(file, images=images))
    assert [fault.record for fault in found.faults] == [2, 4, 5, 6, 7]
    assert [fault.record for fault in check(examiner(file)).faults] == [4, 5, 6, 7]


@pytest.mark.parametrize("jobs", [1, 2])
def test_deep_greys_and_long_strips_are_told_where_images_are_decoded(tmp_path, images, jobs):
    scan = np.arange(64, dtype=np.uint16).reshape(8, 8) * 64
    Image.fromarray(scan).save(images / "scan.png")
    Image.fromarray((scan / 4095).astype(np.float32)).save(images / "float.tif")
    Image.new("1", (70_000, 1)).save(images / "long.png")
    Image.new("1", (30_000, 1)).save(images / "strip.png")
    names = ("a.jpg", "scan.png", "scan.png", "float.tif", "long.png", "strip.png")
    path = tmp_path / "data.json"
    path.write_text(
        json.dumps([{"id": name, "image": name, "conversations": MARKED} for name in names])
    )
    report = check(examiner(path, images=images, decode=True), jobs)
    assert report.scaled == {"12 bits": 2, "floats of 0 to 1": 1}
    assert "greys scaled       2: 12 bits" in table(report)
    assert [(f.id, "side of more than 65535" in f.reason) for f in report.faults] == [
        ("'long.png'", True)
    ]
    crop = open_view(None, "crop")
    report = check(examiner(path, images=images, decode=True, view=crop), jobs)
    assert [f.id for f in report.faults] == ["'long.png'", "'strip.png'"]
    assert "strip.png: 30000x1 is too thin to be cropped" in report.faults[1].reason
    assert not check(examiner(path, images=images), jobs).scaled


@pytest.mark.parametrize("jobs", [1, 2])
def test_lengths_and_targets_are_those_of_training(tmp_path, golden_records, jobs):
    path = tmp_path / "golden.json"
    path.write_text(json.dumps(list(golden_records.values())))
    view = open_view(str(GOLDEN / "vicuna-tiny"))
    report = check(examiner(path, view=view, sq_r=1.0, max_length=700), jobs)
    assert not report.estimated and not report.faults
    encoded = [
        encode_record(record, "v1_sq", view.tokenizer, 1.0, image_tokens=576)
        for record in golden_records.values()
    ]
    assert list(report.lengths) == [len(one.input_ids) for one in encoded]
    assert report.supervised == sum(one.supervised for one in encoded)
    assert report.over_length == sum(len(one.input_ids) > 700 for one in encoded)
    fewer = check(examiner(path, view=view, sq_r=0.0))
    assert fewer.supervised < report.supervised


def test_the_clean_file_holds_the_usable_records_and_lists_the_others(file, images, tmp_path):
    clean = tmp_path / "clean.json"
    check(examiner(file, images=images, decode=True), clean=clean)
    kept = json.loads(clean.read_text())
    assert [record["id"] for record in kept] == ["0", "1", "0"]
    assert kept[2]["image"] == ["a.jpg", "b.jpg"] and "messages" not in kept[2]
    listed = [json.loads(line) for line in (tmp_path / "clean.bad.jsonl").open()]
    assert [fault["record"] for fault in listed] == [2, 3, 4, 5, 6, 7]
    again = check(examiner(clean, images=images, decode=True))
    assert (again.records, again.faults) == (3, [])


def test_a_file_that_ends_too_soon_is_reported_up_to_there_and_not_copied(file, tmp_path):
    file.write_text(file.read_text()[:-30])
    report = check(examiner(file), clean=tmp_path / "clean.json")
    assert report.records == 8 and "record 8" in report.stopped
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json"]


def test_the_command_writes_a_table_a_report_and_a_picture(file, images, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["check", str(file), "--images", str(images), "--decode", "--out", str(out)]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--jobs", "1"])
    assert stop.value.code == 1
    shown = capsys.readouterr().out
    assert (
        "images             3 (decoded)" in shown
        and "records            9" in shown
        and "usable             3" in shown
    )
    assert "bad record 3 (id '3'): " in shown and "cut.jpg" in shown
    report = json.loads((out / "report.json").read_text())
    assert len(report["faults"]) == 6 and report["text_only_share"] == pytest.approx(1 / 3)
    assert sum(report["histogram"]["counts"]) == 3
    assert report["folders"]["coco/train2017"]["expected"] == 118287
    xml.etree.ElementTree.parse(out / "lengths.svg")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_other_files_are_told_and_checked_alike(tmp_path, kind, capsys):
    records = [{"id": str(i), "conversations": TEXT} for i in range(5)]
    path = tmp_path / "data"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, records)))
    else:
        pq.write_table(pa.Table.from_pylist(records), path)
    with pytest.raises(SystemExit) as stop:
        main(["check", str(path)])
    assert stop.value.code == 0
    assert {"jsonl": "JSON lines", "parquet": "Parquet"}[kind] in capsys.readouterr().out


def test_the_layout_is_counted_against_the_known_numbers(tmp_path, capsys):
    folder = tmp_path / "vg/VG_100K"
    folder.mkdir(parents=True)
    for name in ("1.jpg", "2.JPG", "notes.txt"):
        (folder / name).touch()
    (tmp_path / "llava/llava_pretrain/images/00453").mkdir(parents=True)
    (tmp_path / "llava/llava_pretrain/images/00453/1.jpg").touch()
    folders = count_folders(tmp_path)
    assert folders["vg/VG_100K"] == (2, 64_346, False)
    assert folders["llava/llava_pretrain/images"] == (1, 558_128, False)
    table = layout_table(folders)
    assert "64344 missing" in table and "~570486" in table
    with pytest.raises(SystemExit) as stop:
        main(["check", "--images", str(tmp_path)])
    assert stop.value.code == 1 and "64344 missing" in capsys.readouterr().out


def test_flags_that_cannot_be_meant_are_named_before_anything_is_read(file, tmp_path):
    before = file.read_bytes()
    for flags, message in {
        ("--images", tmp_path / "gone"): "--images .*gone: no such folder",
        ("--out", file): "--out .*data.json: a file; name a folder",
        ("--write-clean", file): "that is the file to check; name another",
        ("--write-clean", tmp_path / "no" / "c.json"): "there is no folder .*no$",
        ("--model-max-length", 0): "must be at least 1, found 0",
    }.items():
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            main(["check", str(file), *map(str, flags)])
    assert file.read_bytes() == before


def test_nothing_to_check_is_said():
    with pytest.raises(SystemExit, match="nothing to check"):
        main(["check"])


@given(st.lists(st.integers(0, 100_000)))
def test_every_length_falls_into_a_bar(lengths):
    counted = histogram.count(np.array(lengths, dtype=np.int64))
    assert sum(counted.counts) == len(lengths)
    assert len(counted.edges) == len(counted.counts) + 1
    xml.etree.ElementTree.fromstring(histogram.draw(counted, "a < b".replace("<", "&lt;"), 50))


# Records made wrong in every way that we can think of


def spoilt_records(count: int, seed: int = 0):
    """Good records, each with up to three random faults."""
    rng = random.Random(seed)
    odd = [
        None, True, 0, -1.5, 10**400, float("nan"), "", " ", "\ud800", "\udfff\ud800", "\0",
        "<image>", "x" * 20_000, [], {}, [[]], [[[["deep"]]]], {"from": "human"}, ["human"],
        "é日本\U0001f600",
    ]  # fmt: skip
    for number in range(count):
        base = MARKED if number % 2 else TEXT
        turns = [dict(turn) for turn in base] * rng.randint(1, 3)
        record = {"id": rng.choice([number, str(number), "same"]), "conversations": turns}
        if number % 2:
            record["image"] = "a.jpg"
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            record = _spoil(record, rng, odd)
        yield record


def _spoil(record, rng, odd):
    if not isinstance(record, dict):
        return record
    odd = copy.deepcopy(odd)
    way = rng.randrange(9)
    turns = record.get("conversations")
    if way == 0:
        return rng.choice(odd)
    if way == 1 and record:
        record.pop(rng.choice(list(record)))
    elif way == 2:
        record["".join(rng.choices(string.printable, k=5))] = rng.choice(odd)
    elif way == 3:
        record[rng.choice(("id", "image", "images", "conversations", "messages", "system"))] = (
            rng.choice(odd)
        )
    elif way == 4 and isinstance(turns, list):
        record["messages"] = [
            {"role": t.get("from"), "content": rng.choice([t.get("value"), [t], odd[-1]])}
            for t in turns
            if isinstance(t, dict)
        ]
        del record["conversations"]
    elif isinstance(turns, list) and turns:
        place = rng.randrange(len(turns))
        if way == 5:
            turns[place] = rng.choice(odd)
        elif way == 6:
            turns.pop(place)
        elif way == 7 and isinstance(turns[place], dict):
            turns[place][rng.choice(("from", "value", "role"))] = rng.choice(odd)
        else:
            rng.shuffle(turns)
    return record


def test_2000_spoilt_records_crash_nothing_and_each_fault_is_named(tmp_path, images):
    _check_spoilt(tmp_path, images, 2000)


@pytest.mark.slow
def test_100000_spoilt_records_crash_nothing_and_each_fault_is_named(tmp_path, images):
    _check_spoilt(tmp_path, images, 100_000)


def _check_spoilt(tmp_path, images, count):
    path = tmp_path / "spoilt.json"
    with path.open("w") as handle:
        for number, record in enumerate(spoilt_records(count)):
            handle.write(("[" if number == 0 else ",\n") + json.dumps(record))
        handle.write("]")
    view = open_view(str(GOLDEN / "vicuna-tiny")) if count < 10_000 else VIEW
    clean = tmp_path / "clean.json"
    report = check(examiner(path, images=images, view=view), os.cpu_count(), clean)
    assert report.records == count and not report.stopped
    assert count / 2 < len(report.faults) < count * 0.9
    # The index keeps all, and tells the same records from the others.
    index = open_index(path)
    assert len(index) == count
    faulty = {fault.record: fault for fault in report.faults}
    for number in range(0, count, max(count // 5000, 1)):
        record = index[number]
        try:
            check_record(record, path, number)
        except ValueError as error:
            assert number in faulty
            assert str(error).startswith(f"{path}: record {number} (id {faulty[number].id}): ")
            assert faulty[number].reason
    kept = check(examiner(clean, images=images))
    assert kept.records == report.usable and not kept.faults
    json.dumps([fault.reason for fault in report.faults]).encode()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_any_spoilt_record_is_used_or_named(seed):
    (record,) = spoilt_records(1, seed)
    examined = examiner("some.json")((5, record))
    if examined.fault is not None:
        assert examined.fault.record == 5 and examined.fault.reason
        examined.fault.reason.encode()
