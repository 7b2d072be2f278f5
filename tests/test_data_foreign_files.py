"""Files that are not what they should be: each is told by file, place, what was found and what
would be right; and no reader fails in any other way."""

import gzip
import io
import json
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_check import VIEW, examiner

from sqllava.data.check import check
from sqllava.data.cli import main
from sqllava.data.index import open_index
from sqllava.data.records import RecordError, check_record, file_kind, iter_records

TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a square"}]
GOOD = [{"id": i, "conversations": TURNS} for i in range(3)]
TEXT = json.dumps(GOOD)


def zipped(text: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.json", text)
    return buffer.getvalue()


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (TEXT.encode("utf-16"), "UTF-16 or UTF-32; save it as UTF-8"),
        (TEXT.encode("utf-16-le"), "UTF-16 or UTF-32"),
        (TEXT.encode("utf-16-be"), "UTF-16 or UTF-32"),
        (TEXT.encode("utf-32"), "UTF-16 or UTF-32"),
        (gzip.compress(TEXT.encode()), "compressed by gzip; unpack it"),
        (zipped(TEXT), "a zip archive"),
        (LFS.encode(), "a Git LFS pointer, not the file itself"),
        (b"\n<!DOCTYPE html><html>Sign in", "an HTML page"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "an XML file"),
        (bytes(5000), "filled with zero bytes"),
        (b"ARROW1\0\0rest", "an Arrow file; save it as Parquet"),
        (b"\x80\x04\x95", "a Python pickle, which is never opened"),
        (b"", "holds no records"),
        (b"\xef\xbb\xbf", "holds no records"),
        (b"id,image\n1,a.jpg\n", "expected a JSON array, JSON lines or Parquet"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_file_of_another_kind_is_named_with_what_it_is(tmp_path, data, found):
    path = tmp_path / "data.json"
    path.write_bytes(data)
    for read in (lambda: list(iter_records(path)), lambda: open_index(path)):
        with pytest.raises(RecordError, match="data.json.*" + found):
            read()
    for command in ("check", "show", "index"):
        with pytest.raises(SystemExit) as stop:
            main([command, str(path)])
        assert stop.value.code != 0
    assert not list(tmp_path.glob(".sqllava/*.arrow"))


def test_a_byte_order_mark_and_any_line_ends_are_read(tmp_path):
    path = tmp_path / "data.json"
    lines = [json.dumps(record) for record in GOOD]
    for end in ("\n", "\r\n", "\r"):
        for mark in (b"", b"\xef\xbb\xbf"):
            path.write_bytes(mark + end.join(lines).encode())
            assert list(iter_records(path)) == GOOD and file_kind(path) == "JSON lines"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert list(iter_records(path)) == GOOD and file_kind(path) == "JSON array"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bad", [0, 1500, 1999])
@pytest.mark.parametrize("array", [True, False])
def test_one_byte_of_another_encoding_is_found_in_its_record_and_line(tmp_path, end, bad, array):
    lines = [json.dumps({"id": i, "conversations": TURNS}).encode() for i in range(2000)]
    lines[bad] = lines[bad].replace(b"a square", b"un carr\xe9")
    start, comma, stop = (b"[", b",", b"]") if array else (b"", b"", b"")
    data = start + (comma + end.encode()).join(lines) + stop
    path = tmp_path / "latin1.json"
    path.write_bytes(data)
    where = f"record {bad}, line {bad + 1}, character {data.index(0xE9)}: "
    with pytest.raises(RecordError, match=where + ".*byte 0xe9 is not UTF-8 .*near .*un carr"):
        list(iter_records(path))
    report = check(examiner(path))
    assert report.records == bad and where in report.stopped


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT[:-30], "record 2, line 1, .*the file ends within a record"),
        (TEXT[:-1], "record 3, line 1, .*expected ',' or ']'"),
        ('[{"id": 1},\n{"image": "a", "image": "b"}]', "record 1, line 2, .*'image' stands twice"),
        ('[{"id": 1},\n{"a": ' + "[" * 900 + "]" * 900 + "}]", "record 1, line 2, .*nested more"),
        ("[" * 100_000, "record 0, line 1, .*nested more than 100 deep"),
        ('{"id": 1}\n{"id": ' + "9" * 5000 + "}", "record 1, line 2, .*4300 digits"),
        ('{"id": 1}\n{"a": "\x07"}', "record 1, line 2, .*control character"),
    ],
)
def test_malformed_json_is_named_with_record_line_and_fault(tmp_path, text, message):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=r"data\.json: " + message):
        list(iter_records(path))


def test_a_file_that_ends_within_a_character_says_so(tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes('[{"id": "é'.encode()[:-1])
    with pytest.raises(RecordError, match="record 0, .*ends within a character"):
        list(iter_records(path))


def test_what_json_allows_besides_is_read(tmp_path):
    path = tmp_path / "data.json"
    deep: list = []
    for _ in range(50):
        deep = [deep]
    records = [{"id": 10**400, "x": float("inf"), "y": "\ud800", "z": deep}]
    path.write_text(json.dumps(records) + "\n" + '{"id": 1, "id": 1}')
    path.write_text(path.read_text().strip("[").replace("]\n{", "\n{"))
    assert next(iter_records(path))["x"] == float("inf")


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (float("nan"), "'image' must be a file name .*nan"),
        (
            {"bytes": None, "path": "a.jpg"},
            "'image' must .* itself .*save each picture",
        ),
        ([{"bytes": "<bytes>", "path": None}], "'image' must be .*found the picture itself"),
    ],
)
def test_an_image_that_is_no_name_says_what_to_do(image, reason):
    with pytest.raises(RecordError, match=rf"record 4 \(id 1\): {reason}"):
        check_record({"id": 1, "image": image, "conversations": TURNS}, "a.json", 4)


def test_a_record_without_conversations_names_the_keys_that_it_has(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"version": 1, "annotations": GOOD}))
    (fault,) = check(examiner(path)).faults
    assert "'conversations' must be a list" in fault.reason and "annotations" in fault.reason


# Parquet


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("spoilt", ["time", "note"])
def test_a_cell_that_nobody_reads_may_be_unreadable_and_that_is_told(tmp_path, spoilt):
    odd = {
        "time": pa.array([0, 2**62, 0], pa.timestamp("us")),
        "note": pa.array([b"a", b"\xe9", b"c"]),
    }
    cells = odd[spoilt]
    if spoilt == "note":
        cells = pa.StringArray.from_buffers(3, *cells.buffers()[1:])
    path = parquet(tmp_path / "a.parquet", id=[1, 2, 3], conversations=[TURNS] * 3, extra=cells)
    report = check(examiner(path))
    assert report.records == 3 and not report.faults and not report.stopped
    assert [n for what, n in report.converted.items() if "'extra' cannot be read" in what] == [1]
    assert len(open_index(path)) == 3


def test_text_that_is_not_utf8_in_a_turn_is_a_fault_of_its_record(tmp_path):
    text = pa.StringArray.from_buffers(2, *pa.array([b"ok", b"caf\xe9"]).buffers()[1:])
    turns = pa.StructArray.from_arrays([pa.array(["human", "gpt"]), text], ["from", "value"])
    cells = pa.ListArray.from_arrays([0, 2], turns)
    path = parquet(tmp_path / "a.parquet", id=["x"], conversations=cells)
    (fault,) = check(examiner(path)).faults
    assert (fault.record, fault.id) == (0, "'x'") and "0xe9" in fault.reason
    with pytest.raises(SystemExit) as stop:
        main(["show", str(path)])
    assert stop.value.code == 1


def test_a_parquet_image_column_says_what_to_do(tmp_path):
    image = [{"bytes": b"\x89PNG", "path": "a.png"}]
    path = parquet(tmp_path / "a.parquet", id=[1], image=image, conversations=[TURNS])
    (fault,) = check(examiner(path)).faults
    assert "found the picture itself (an Image column of a hub data set)" in fault.reason


@pytest.mark.parametrize("cut", [4, 100, 400, -1, -9])
def test_a_truncated_parquet_file_is_named(tmp_path, cut):
    path = parquet(tmp_path / "a.parquet", id=[1], conversations=[TURNS])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(RecordError, match=r"a\.parquet: not a readable Parquet file \(cut short"):
        list(iter_records(path))


def test_a_parquet_file_without_rows_or_without_the_columns_is_named(tmp_path):
    path = parquet(tmp_path / "a.parquet", id=pa.array([], pa.int64()))
    with pytest.raises(RecordError, match="holds no records"):
        list(iter_records(path))
    path = parquet(tmp_path / "b.parquet", question=["What?"], answer=["a square"])
    (fault,) = check(examiner(path)).faults
    assert "found the keys 'question, answer'" in fault.reason
    twice = pa.table([pa.array([1]), pa.array([2])], names=["id", "id"])
    pq.write_table(twice, tmp_path / "c.parquet")
    with pytest.raises(RecordError, match=r"c\.parquet: has two columns of one name"):
        list(iter_records(tmp_path / "c.parquet"))


# Names


def test_what_is_no_file_says_what_would_be_right(tmp_path):
    (tmp_path / "set.jsonl").write_text(TEXT)
    cases = {
        "lmms-lab/LLaVA-Video-178K": "nothing is fetched from the hub: download it first .hf",
        "https://huggingface.co/a.json": "nothing is fetched from addresses",
        "hf://datasets/a/b": "nothing is fetched from addresses",
        str(tmp_path): "it is a folder, which holds set.jsonl: name a JSON, JSON lines or Parquet",
        "some/where.json": "no such data file$",
        "a\0b": "no such data file$",
    }
    for name, message in cases.items():
        for command in ("check", "show", "index"):
            with pytest.raises(SystemExit, match="error: .*" + message):
                main([command, name])


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "data.json"
    path.write_text(TEXT)

    def denied(self, *_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.open", denied)
    with pytest.raises(SystemExit, match="error: .*Permission denied: .*data.json"):
        main(["check", str(path)])


# Anything at all

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["<image>", "a.jpg", "human", "gpt", "\ud800", "<video>"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["from", "value", "image", "images", "video", "type", "text", "role"])
            | st.text(max_size=4),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)
KEYS = st.sampled_from(
    ["id", "image", "images", "conversations", "messages", "system", "video", "image_path"]
)
SHAPES = VALUES | st.dictionaries(KEYS, VALUES, max_size=5)
ENCODINGS = st.sampled_from(
    ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-7"]
)


def read_somehow(path):
    """Reads a file in every way; nothing but our own errors, with the file's name, may come."""
    for read in (
        lambda: check(examiner(path, view=VIEW)),
        lambda: open_index(path, path.parent / "cache").images,
        lambda: file_kind(path),
    ):
        try:
            read()
        except RecordError as error:
            assert path.name in str(error) and str(error).isprintable()
    try:
        for number, record in enumerate(iter_records(path)):
            try:
                check_record(record, path, number)
            except RecordError as error:
                assert f"record {number} (id " in str(error)
    except RecordError as error:
        assert path.name in str(error)


@settings(deadline=None, max_examples=80)
@given(st.lists(SHAPES, max_size=4), ENCODINGS, st.booleans(), st.data())
def test_any_json_in_any_encoding_is_read_or_named(
    tmp_path_factory, records, encoding, array, data
):
    ascii_only = data.draw(st.booleans())
    texts = [json.dumps(record, ensure_ascii=ascii_only) for record in records]
    text = f"[{','.join(texts)}]" if array else "\n".join(texts)
    written = bytearray(text.encode(encoding, "replace"))
    for _ in range(data.draw(st.integers(0, 2))):
        if written:
            written[data.draw(st.integers(0, len(written) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("any") / "data.json"
    path.write_bytes(written[: data.draw(st.integers(0, len(written)))])
    read_somehow(path)


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=60), st.sampled_from([b"", b"[", b"{", b"\xef\xbb\xbf", b"PAR1"]))
def test_any_bytes_are_read_or_named(tmp_path_factory, content, start):
    path = tmp_path_factory.mktemp("any") / "data.json"
    path.write_bytes(start + content)
    read_somehow(path)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_damaged_parquet_is_read_or_named(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("any") / "a.parquet"
    parquet(
        path,
        id=[1, 2],
        conversations=[TURNS] * 2,
        time=pa.array([0, 2**62], pa.timestamp("us")),
        image=[{"bytes": b"x", "path": "y"}, None],
    )
    written = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        written[data.draw(st.integers(4, len(written) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(written[: data.draw(st.integers(4, len(written)))])
    read_somehow(path)
