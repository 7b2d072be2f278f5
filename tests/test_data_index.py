"""The memory-mapped index: made once, safely, and read lazily."""

import json
import multiprocessing
import os
import pickle
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sqllava.data import index as index_module
from sqllava.data.index import RecordIndex, index_path, open_index
from sqllava.data.records import RecordError


def record(number: int) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "é" * number}]
    kind = {} if number % 3 else {"image": f"{number}.jpg"}
    return {"id": str(number), **kind, "conversations": turns, "width": 640}


@pytest.fixture(autouse=True)
def no_cache_set(monkeypatch):
    monkeypatch.delenv("SQLLAVA_CACHE", raising=False)


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(index_module, "_BATCH_RECORDS", 16)
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record(number) for number in range(100)], ensure_ascii=False))
    return path


def test_every_record_and_column_comes_back(source):
    index = open_index(source)
    assert len(index) == 100
    assert [index[number] for number in range(100)] == [record(number) for number in range(100)]
    assert list(index) == [record(number) for number in range(100)]
    assert index.characters.dtype == np.int32 and index.images.dtype == np.int16
    assert index.characters.tolist() == [13 + number for number in range(100)]
    assert index.images.tolist() == [int(number % 3 == 0) for number in range(100)]
    assert index.source == source
    for outside in (-1, 100):
        with pytest.raises(IndexError, match="it has 100"):
            index[outside]


def test_records_about_the_same_images_have_one_key(tmp_path):
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    images = ["a.jpg", ["a.jpg"], "b.jpg", ["a.jpg", "b.jpg"], ["b.jpg", "a.jpg"], None, 5]
    file = tmp_path / "keys.json"
    file.write_text(json.dumps([{"image": image, "conversations": turns} for image in images]))
    keys = open_index(file).image_keys
    assert keys.dtype == np.int64 and keys[0] == keys[1] != 0
    assert keys[5] == keys[6] == 0  # none, and one of the wrong shape
    assert len(set(keys.tolist())) == 5


def test_batches_are_bounded_by_size_too(source, monkeypatch):
    monkeypatch.setattr(index_module, "_BATCH_CHARACTERS", 300)
    index = open_index(source)
    assert len(index._batches) > 7
    assert index[99] == record(99)


def test_lines_and_parquet_give_the_same_index(source, tmp_path):
    records = json.loads(source.read_text())
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "data.parquet")
    array = open_index(source)
    for name in ("data.jsonl", "data.parquet"):
        other = open_index(tmp_path / name)
        assert [{"image": None, **row} for row in array] == [
            {"image": None, **row} for row in other
        ]
        assert other.images.tolist() == array.images.tolist()
        assert other.characters.tolist() == array.characters.tolist()


def test_it_is_made_once_and_anew_when_the_source_changes(source):
    first = open_index(source)
    made = first.path.stat()
    assert open_index(source).path.stat().st_ino == made.st_ino
    source.write_text(json.dumps([record(5)]))
    assert len(open_index(source)) == 1
    assert len(first) == 100 and first[50] == record(50)


def test_only_what_is_asked_for_is_parsed(source, monkeypatch):
    open_index(source)
    read = []
    real = json.loads
    monkeypatch.setattr(index_module.json, "loads", lambda text: read.append(text) or real(text))
    index = open_index(source)
    assert index.images.sum() == 34 and not read
    assert index[42]["id"] == "42" and len(read) == 1


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_reading_everything_keeps_the_resident_size_flat(tmp_path):
    path = tmp_path / "data.jsonl"
    with path.open("w") as handle:
        for number in range(2000):
            handle.write(json.dumps({**record(number), "filler": "x" * 50_000}) + "\n")

    def resident() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("Rss:"))) * 1024

    index = open_index(path)
    before = resident()
    assert all(row["width"] == 640 for row in index)
    assert path.stat().st_size > 100e6
    assert resident() - before < 30e6


def test_bad_records_stay_readable(tmp_path):
    path = tmp_path / "data.json"
    bad = [{"id": "a"}, 5, None, ["x"], {"image": 3, "conversations": {"from": []}}, "\ud800"]
    path.write_text(json.dumps([*bad, record(3)]))
    index = open_index(path)
    assert list(index) == [*bad, record(3)]
    assert index.images.tolist() == [0] * 6 + [1]


def test_a_malformed_file_leaves_no_index(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"id": 1}, {"id" 2}]')
    with pytest.raises(RecordError, match=r"data\.json: record 1, line 1"):
        open_index(path)
    assert not index_path(path).exists()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_index(tmp_path / "nowhere.json")


def test_a_source_that_grows_meanwhile_is_refused(source, monkeypatch):
    real = index_module.iter_with_text

    def growing(path):
        yield from real(path)
        with source.open("a") as handle:
            handle.write(" ")

    monkeypatch.setattr(index_module, "iter_with_text", growing)
    with pytest.raises(ValueError, match="changed while it was read"):
        open_index(source)
    assert not list(source.parent.glob(".sqllava/*.arrow"))


def test_the_cache_folder(source, tmp_path, monkeypatch):
    assert open_index(source).path.parent == source.parent / ".sqllava"
    cached = open_index(source, tmp_path / "cache")
    assert cached.path.is_relative_to(tmp_path / "cache") and cached[3] == record(3)
    monkeypatch.setenv("SQLLAVA_CACHE", str(tmp_path / "other"))
    assert open_index(source).path.is_relative_to(tmp_path / "other")
    # Files of one name, size and time in two folders do not meet.
    twin = tmp_path / "twin" / source.name
    twin.parent.mkdir()
    twin.write_text(source.read_text().replace("What", "When"))
    os.utime(twin, ns=(source.stat().st_atime_ns, source.stat().st_mtime_ns))
    assert open_index(twin)[0] != open_index(source)[0]


def test_other_records_of_the_same_size_and_time_are_indexed_anew(source):
    before = open_index(source)[0]
    stat = source.stat()
    source.write_text(source.read_text().replace("What", "When"))
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert source.stat().st_size == stat.st_size
    assert open_index(source)[0] != before


def test_a_source_folder_that_cannot_be_written_to(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(index_module.os, "access", lambda *_: False)
    assert open_index(source).path.is_relative_to(tmp_path / "home" / ".cache" / "sqllava")


def test_a_broken_index_says_what_to_do(source):
    path = open_index(source).path
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="delete it"):
        open_index(source)


def test_a_killed_build_leaves_nothing_that_counts(source, monkeypatch):
    real = index_module.iter_with_text

    def deadly(path):
        for number, row in enumerate(real(path)):
            if number == 70:
                os.kill(os.getpid(), signal.SIGKILL)
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(index_module, "iter_with_text", deadly)
        child = multiprocessing.get_context("fork").Process(target=open_index, args=(source,))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    assert [path.suffix for path in (source.parent / ".sqllava").glob("*.tmp")] == [".tmp"]
    assert len(open_index(source)) == 100
    assert not list((source.parent / ".sqllava").glob("*.tmp"))


def test_of_openers_at_the_same_time_one_makes_it(source, monkeypatch):
    context = multiprocessing.get_context("fork")
    builds, barrier, results = context.Value("i", 0), context.Barrier(3), context.Queue()
    real = index_module._build

    def counted(*args):
        with builds.get_lock():
            builds.value += 1
        real(*args)

    def opener():
        barrier.wait()
        results.put(open_index(source)[77] == record(77))

    monkeypatch.setattr(index_module, "_build", counted)
    children = [context.Process(target=opener) for _ in range(3)]
    for child in children:
        child.start()
    assert [results.get(timeout=60) for _ in children] == [True] * 3
    for child in children:
        child.join()
    assert builds.value == 1


def read_record(index: RecordIndex, number: int) -> dict:
    return index[number]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_it_works_in_workers(source, method):
    index = open_index(source)
    assert len(pickle.dumps(index)) < 1000
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(read_record, (index, 60)) == record(60)


def test_copies_on_other_nodes_give_the_same_index(source, tmp_path):
    copy = tmp_path / "node2" / source.name
    copy.parent.mkdir()
    copy.write_bytes(source.read_bytes())
    assert open_index(copy).path.read_bytes() == open_index(source).path.read_bytes()
