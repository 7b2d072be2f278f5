"""Reading source files as streams, and the schema check."""

import io
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqllava.data.records import (
    RecordError,
    _iter_json,
    check_record,
    file_kind,
    iter_records,
    iter_with_text,
    normalize,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.text(st.characters(categories=("Cs",)), max_size=2),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
SPACE = st.text(" \t\r\n", max_size=40)
CHUNK = st.integers(1, 300)


def record(**changes) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    return {"id": "a", "image": "a.jpg", "conversations": turns, **changes}


def parse(data: bytes, chunk: int = 1 << 20) -> list[tuple]:
    return list(_iter_json(io.BytesIO(data), Path("some.json"), chunk))


@st.composite
def spaced_json(draw, value):
    """The value as JSON with any white space between its tokens."""
    if isinstance(value, list):
        parts = [draw(spaced_json(item)) for item in value]
        inner, brackets = ",".join(parts), "[]"
    elif isinstance(value, dict):
        pairs = [
            f"{draw(SPACE)}{json.dumps(key)}{draw(SPACE)}:{draw(spaced_json(item))}"
            for key, item in value.items()
        ]
        inner, brackets = ",".join(pairs), "{}"
    else:
        surrogates = any("\ud800" <= c <= "\udfff" for c in str(value))
        ascii_only = surrogates or draw(st.booleans())
        return draw(SPACE) + json.dumps(value, ensure_ascii=ascii_only) + draw(SPACE)
    return draw(SPACE) + brackets[0] + inner + draw(SPACE) + brackets[1] + draw(SPACE)


@settings(deadline=None)
@given(st.data(), st.lists(JSON, max_size=5), CHUNK)
def test_an_array_reads_as_json_load_reads_it(data, values, chunk):
    text = data.draw(spaced_json(values))
    read = parse(text.encode(), chunk)
    assert [value for value, _ in read] == json.loads(text)
    assert [json.loads(part) for _, part in read] == json.loads(text)


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.text(), JSON, max_size=2), max_size=3), st.booleans(), CHUNK)
def test_lines_read_as_json_loads_reads_each(values, spread, chunk):
    lines = [json.dumps(value, indent=2 if spread else None) for value in values]
    read = parse("\n".join(lines).encode(), chunk)
    assert [value for value, _ in read] == [json.loads(line) for line in lines]


@settings(deadline=None)
@given(st.lists(JSON, min_size=1, max_size=5), st.integers(1, 50), st.data())
def test_a_cut_file_is_an_error_at_any_place(values, chunk, data):
    text = json.dumps(values)
    cut = data.draw(st.integers(1, len(text) - 1))
    with pytest.raises(RecordError, match=r"some\.json: record \d+, line 1, character"):
        parse(text[:cut].encode(), chunk)


@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 1} {"a": 2}]',
        '[{"a": 1},]',
        '[{"a": 1}] x',
        '[{"a": 1}',
        '[{"a": tru}]',
        "hello",
        '{"a": 1} {',
        '[{"a": "\n"}]',
        "[" * 100_000,
        '[{"a": ' + "9" * 5000 + "}]",
    ],
)
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_malformed_json_is_an_error(text, chunk):
    with pytest.raises(RecordError, match=r"some\.json: record \d+, line \d+, character \d+: not"):
        parse(text.encode(), chunk)


def test_an_error_says_where():
    text = '[\n{"a": 1},\n{"a": 2},\n{"a" 3}\n]'
    with pytest.raises(RecordError, match=r"record 2, line 4, character 27: .*delimiter.*3}"):
        parse(text.encode(), chunk=5)


def test_an_error_is_found_before_the_rest_is_read():
    class Counted(io.BytesIO):
        count = 0

        def read(self, size=-1):
            self.count += size
            return super().read(size)

    handle = Counted(b'[{"a" 1},' + b'{"a": 1},' * 100_000 + b"{}]")
    with pytest.raises(RecordError, match="record 0"):
        list(_iter_json(handle, Path("some.json"), 1000))
    assert handle.count <= 2000


def test_bytes_that_are_not_utf8_are_an_error():
    with pytest.raises(RecordError, match=r"record 1.*not valid JSON in UTF-8"):
        parse(b'[{"a": 1}, {"a": "\xff"}]', chunk=8)


def test_a_byte_order_mark_is_no_matter():
    assert parse(b'\xef\xbb\xbf[{"a": 1}]') == [({"a": 1}, '{"a": 1}')]


def test_reading_is_lazy():
    class Endless(io.RawIOBase):
        def read(self, size=-1):
            return (b'{"a": "' + b"x" * 93 + b'"}\n')[:size] * (size // 103 or 1)

    values = _iter_json(Endless(), Path("some.jsonl"), 1030)
    assert len([next(values) for _ in range(1000)]) == 1000


def test_the_kind_is_told_by_content_not_by_name(tmp_path):
    records = [record(id="a"), record(id="b", image=None)]
    array, lines, table = tmp_path / "a.jsonl", tmp_path / "b.parquet", tmp_path / "c.json"
    array.write_text(json.dumps(records, indent=1))
    lines.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    pq.write_table(pa.Table.from_pylist(records), table)
    for path in (array, lines, table):
        assert list(iter_records(path)) == records
        assert [json.loads(text) for _, text in iter_with_text(path)] == records


def test_messages_are_read_as_conversations_and_that_is_said_once(tmp_path, caplog):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"id": 1, "messages": messages}] * 3))
    caplog.set_level("INFO")
    records = list(iter_records(path))
    turns = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Yes?"}]
    assert records == [{"id": 1, "conversations": turns}] * 3
    check_record(records[0], path, 0)
    assert [json.loads(text) for _, text in iter_with_text(path)] == records
    assert caplog.text.count("3 records: 'messages' read as 'conversations'") == 2  # a reading each


PLAIN = [{"from": "user", "value": "<image>\nHi"}, {"from": "assistant", "value": "Yes"}]
MESSAGES = [{"role": "user", "content": "<image>\nHi"}, {"role": "assistant", "content": "Yes"}]
PARTS = [
    {
        "role": "user",
        "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "Hi"}],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]},
]


@pytest.mark.parametrize(
    ("other", "changes"),
    [
        ({"messages": MESSAGES, "image": "a.jpg"}, ["'messages' read", "'role' and"]),
        ({"messages": MESSAGES, "images": ["a.jpg"]}, ["'messages'", "'images'", "'role'"]),
        ({"conversations": MESSAGES, "image": "a.jpg"}, ["'role' and 'content'"]),
        ({"messages": PARTS}, ["'messages'", "'role'", "in parts"]),
        ({"messages": PARTS, "image": ["a.jpg"]}, ["'messages'", "'role'", "in parts"]),
        ({"conversations": PLAIN, "image": "a.jpg", "system": "Be brief."}, ["system text left"]),
        (
            {
                "image": "a.jpg",
                "conversations": [{"from": "system", "value": "Be brief."}, *PLAIN],
            },
            ["system text left"],
        ),
        (
            {
                "image": "a.jpg",
                "messages": [{"role": "system", "content": "Be brief."}, *MESSAGES],
            },
            ["'messages'", "'role'", "system text left"],
        ),
    ],
    ids=str,
)
def test_other_forms_become_the_same_record(tmp_path, other, changes):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([other]))
    converted = Counter()
    ((found, text),) = iter_with_text(path, converted)
    assert found.pop("image") in ("a.jpg", ["a.jpg"])
    assert found == {"conversations": PLAIN}
    assert json.loads(text)["conversations"] == PLAIN
    check_record({**found, "image": "a.jpg"}, path, 0)
    assert len(converted) == len(changes) and set(converted.values()) == {1}
    assert all(part in change for part, change in zip(changes, converted, strict=True))


def test_llavas_own_form_is_left_as_it_stands(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[ {"id" :1, "conversations":[{"from":"human","value":"Hi"}] } ]')
    converted = Counter()
    ((_, text),) = iter_with_text(path, converted)
    assert text == '{"id" :1, "conversations":[{"from":"human","value":"Hi"}] }' and not converted


@settings(deadline=None)
@given(JSON)
def test_normalising_understands_or_leaves_alone(value):
    forms = (value, {"messages": value}, {"conversations": [value]}, {"messages": [value, value]})
    for form in (*forms, {"conversations": [{"role": "user", "content": value}], "images": value}):
        once, changes = normalize(form)
        assert normalize(once) == (once, ())
        if not changes and not (isinstance(form, dict) and "system" in form):
            assert once == form


@pytest.mark.parametrize(
    ("text", "kind"),
    [(" [1]", "JSON array"), ('{"a": 1}\n', "JSON lines"), ("", "JSON lines")],
)
def test_the_kind_is_named(tmp_path, text, kind):
    (tmp_path / "a").write_text(text)
    assert file_kind(tmp_path / "a") == kind
    pq.write_table(pa.Table.from_pylist([{"a": 1}]), tmp_path / "b")
    assert file_kind(tmp_path / "b") == "Parquet"


@pytest.mark.parametrize("text", ["", " \n", "[]", " [ ] "])
def test_no_records_are_an_error(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(RecordError, match="holds no records"):
        list(iter_records(path))


def test_a_broken_parquet_file_is_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1" + b"x" * 100)
    with pytest.raises(RecordError, match="Parquet"):
        list(iter_records(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(iter_records(tmp_path / "nowhere.json"))


HUMAN = {"from": "human", "value": "Hi"}
MARKED = {"from": "human", "value": "<image>\n<image>\nWhich?"}
GPT = {"from": "gpt", "value": "Yes"}


@pytest.mark.parametrize(
    "good",
    [
        record(),
        record(image=["a.jpg"]),
        record(image=["a.jpg", "b.jpg"], conversations=[MARKED, GPT]),
        record(image=None, conversations=[HUMAN, GPT, HUMAN, GPT]),
        {"conversations": [HUMAN, GPT]},
        {"image": [], "conversations": [HUMAN, GPT]},
    ],
)
def test_good_records_pass(good):
    check_record(good, "some.json", 3)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record(conversations=[GPT, HUMAN]), "turn 0 must come from 'human'"),
        (record(conversations=[HUMAN]), "pairs"),
        (record(conversations=[]), "pairs"),
        (record(conversations=None), "'conversations' must be a list"),
        (record(conversations=[{"from": ["human"], "value": "x"}, GPT]), ""),
        (record(conversations=[{"from": "human", "value": 3}, GPT]), "'value' must be text"),
        (record(conversations=["x", GPT]), "dict"),
        (record(image={"bytes": "<bytes>"}), "'image' must be a file name"),
        (record(image=["a.jpg", 3]), "'image' must be a file name"),
        (record(image=""), "'image' must be a file name"),
        (record(image=None), "1 <image> marks .* 0 names"),
        (record(image=["a.jpg", "b.jpg"]), "1 <image> marks .* 2 names"),
        (record(conversations=[HUMAN, GPT]), "0 <image> marks .* 1 names"),
        (record(conversations=[MARKED, {"from": "gpt", "value": "\ud800"}]), "'image'"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": "\ud800"}], "id": "a"}, "surrogates"),
    ],
)
def test_bad_records_are_named_with_the_reason(bad, reason):
    with pytest.raises(RecordError, match=rf"^some\.json: record 7 \(id 'a'\): .*{reason}"):
        check_record(bad, "some.json", 7)


@settings(deadline=None)
@given(JSON)
def test_the_check_fails_in_no_other_way(value):
    for bad in (value, {"conversations": value}, record(image=value), [value]):
        try:
            check_record(bad, "some.json", 0)
        except RecordError as error:
            assert str(error).startswith("some.json: record 0 (id ")
