"""The data engine: its filters, and that a killed run loses nothing and repeats nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from training import environment

from sqllava import load
from sqllava.ask import data_engine
from sqllava.ask.data_engine import (
    DrawnImage,
    DrawnQuestion,
    Settings,
    judge_answer,
    judge_questions,
    list_images,
    make_self_qa,
    pending,
    record_of,
    word_f1,
)
from sqllava.conversation import DESCRIBE_QUESTION
from sqllava.data.records import check_record, iter_records
from sqllava.encoding import encode_record
from sqllava.generation.decoding import Decoding
from sqllava.generation.writer import Written

BRIEF = {
    "asking": Decoding(8, samples=3, temperature=1.2, top_k=300, top_p=0.95),
    "answering": Decoding(6),
    "checking": Decoding(6, samples=2, temperature=0.7),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 23 small images in two folders, one of them broken."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = random.Random(0)
    (folder / "deeper").mkdir()
    for number in range(22):
        color = tuple(rng.randrange(256) for _ in range(3))
        name = f"deeper/{number}.png" if number % 3 else f"{number}.PNG"
        Image.new("RGB", (40 + number, 30), color).save(folder / name)
    (folder / "broken.jpg").write_text("no image")
    (folder / "notes.txt").write_text("no image either")
    return folder


@pytest.fixture(scope="module")
def talker(adapter, tmp_path_factory):
    """A tiny random model that ends its texts: nearly every word of it is an end token."""
    folder = tmp_path_factory.mktemp("talker")
    model, processor = load(adapter)
    words = [i for i in range(259, 1345) if processor.tokenizer.decode([i]).strip()]
    model.generation_config.eos_token_id = [2, *words]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run_settings(model, **changes):
    return Settings(model=str(model), batch=4, **{**BRIEF, **changes})


def test_every_image_gets_one_record_that_the_trainer_takes(talker, pictures, tmp_path, tokenizer):
    out = tmp_path / "self_qa.json"
    report = make_self_qa(pictures, out, run_settings(talker))
    records = list(iter_records(out))
    _, names = list_images(pictures)
    assert [record["image"] for record in records] == [n for n in names if n != "broken.jpg"]
    for number, record in enumerate(records):
        check_record(record, out, number)
        assert encode_record(record, "v1_sq", tokenizer, 1.0).supervised
    assert report["settings"]["describe_every"] == 3
    assert report["images"] == {"given": 23, "written": 22, "unreadable": 1, "nothing kept": 0}
    assert "broken.jpg" in report["unreadable"][0]
    assert report["questions"]["drawn"] == 22 * 3
    described = [values(record)[0].endswith(DESCRIBE_QUESTION) for record in records]
    assert report["descriptions"] == sum(described)
    assert sum(report["questions"][verdict] for verdict in data_engine.VERDICTS) == 22 * 3
    assert json.loads(out.with_name("self_qa.json.report.json").read_text()) == report


def test_an_answer_that_only_echoes_the_description_is_inconsistent():
    class Echoing:
        """Counts three things where a description in view names three, and else two."""

        model = SimpleNamespace(device=torch.device("cpu"))

        def encode(self, pictures, remember):
            return pictures

        def write(self, several, images, decoding):
            texts = [self._write([turn.text or "" for turn in turns]) for turns in several]
            return [[Written(text, True)] * decoding.samples for text in texts]

        def _write(self, texts):
            if texts == [DESCRIBE_QUESTION, ""]:
                return "A cat, a dog and a mouse."
            if texts[-2].startswith("How many"):
                return "three" if "mouse" in " ".join(texts) else "two"
            return "How many animals are there?"

    settings = Settings(model="", **BRIEF)
    ((description, questions),) = data_engine.draw(
        Echoing(), [Image.new("RGB", (4, 4))], settings, 0
    )
    assert description == "A cat, a dog and a mouse."
    assert [question.verdict for question in questions] == ["inconsistent", "repeated", "repeated"]
    assert (questions[0].answer, questions[0].agreement) == ("three", 0.0)


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(talker, pictures, tmp_path):
    settings = run_settings(talker, checking=None)
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    make_self_qa(pictures, one, settings)
    make_self_qa(pictures, two, settings, processes=2)
    assert len(list((tmp_path / "two.json.parts").glob("*.jsonl"))) == 2
    assert one.read_bytes() == two.read_bytes()


def test_a_run_goes_on_where_it_was(talker, pictures, tmp_path, monkeypatch):
    whole, resumed = tmp_path / "whole.json", tmp_path / "resumed.json"
    settings = run_settings(talker)
    make_self_qa(pictures, whole, settings)
    drawn, draw = [], data_engine.draw

    def stopping(*args):
        drawn.append(args)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(data_engine, "draw", stopping)
    with pytest.raises(KeyboardInterrupt):
        make_self_qa(pictures, resumed, settings)
    parts = tmp_path / "resumed.json.parts"
    assert pending(parts, 23, 4) == [2, 3, 4, 5]
    # A line that a kill has torn, and a batch of which only one line got out.
    part = next(parts.glob("*.jsonl"))
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    assert pending(parts, 23, 4) == [1, 2, 3, 4, 5]
    assert not resumed.exists()
    make_self_qa(pictures, resumed, settings)
    assert resumed.read_bytes() == whole.read_bytes()
    again = drawn[:]
    make_self_qa(pictures, resumed, settings)
    assert drawn == again  # nothing was left to do


def test_other_settings_do_not_go_on(talker, pictures, tmp_path):
    out = tmp_path / "self_qa.json"
    make_self_qa(pictures, out, run_settings(talker))
    with pytest.raises(ValueError, match="was begun with other settings .*seed 0 there, 1 now"):
        make_self_qa(pictures, out, run_settings(talker, seed=1))
    (pictures / "new.png").write_bytes((pictures / "0.PNG").read_bytes())
    try:
        with pytest.raises(ValueError, match="images 23 there, 24 now"):
            make_self_qa(pictures, out, run_settings(talker))
    finally:
        (pictures / "new.png").unlink()


def test_images_come_from_a_data_file_too(tmp_path, pictures):
    records = [
        {"id": "a", "image": "0.PNG", "conversations": []},
        {"id": "b", "conversations": []},
        {"id": "c", "image": ["deeper/1.png", "0.PNG"], "conversations": []},
    ]
    source = tmp_path / "data.json"
    source.write_text(json.dumps(records))
    assert list_images(source, pictures) == (pictures, ["0.PNG", "deeper/1.png"])
    assert list_images(source)[0] == tmp_path
    with pytest.raises(ValueError, match="holds no images"):
        list_images(tmp_path)
    source.write_text(json.dumps([{"id": "a"}, {"id": "b", "image": 7}]))
    with pytest.raises(ValueError, match=rf"{source.name}: record 1 \(id 'b'\): 'image' must be"):
        list_images(source)


# --- filters --------------------------------------------------------------------------------------


def test_questions_are_judged_by_their_form_and_their_neighbours():
    texts = [
        ("What is it?", True),
        ("what IS it ?", True),
        ("Why", True),
        ("", True),
        ("A long one that was cut", False),
        ("Two\nlines?", True),
        ("<image> of what?", True),
        ("And? ASSISTANT: no. VUSER: why?", True),
        ("Who?", True),
        ("What is it? A dog. Who?", True),
    ]
    judged = judge_questions([Written(*text) for text in texts])
    none = "no question"
    expected = ["kept", "repeated", none, none, "cut", none, none, none, "kept", none]
    assert [question.verdict for question in judged] == expected


@pytest.mark.parametrize(
    ("answer", "samples", "agreement", "verdict"),
    [
        (Written("yes", True), ["yes", "Yes.", "yes", "no"], 0.75, "kept"),
        (Written("yes", True), ["yes", "no", "no", "no"], 0.25, "inconsistent"),
        (Written("yes", True), [], None, "kept"),
        (Written("yes", False), ["yes"], 1.0, "no answer"),
        (Written("", True), [""], 1.0, "no answer"),
        (Written("see <image>", True), ["see <image>"], 1.0, "no answer"),
    ],
)
def test_answers_are_judged_by_how_far_samples_agree(answer, samples, agreement, verdict):
    question = DrawnQuestion("Is it?", "kept")
    judge_answer(question, answer, samples, 0.75)
    assert (question.verdict, question.agreement) == (verdict, agreement)


def test_word_f1_is_squads():
    assert word_f1("a big red dog", "the big dog") == pytest.approx(4 / 7)
    assert word_f1("dog dog cat", "dog") == pytest.approx(0.5)
    assert word_f1("Yes!", "yes") == 1.0
    assert word_f1("", "yes") == 0.0
    assert word_f1("?", "?") == 1.0


@given(st.text(max_size=20), st.text(max_size=20))
def test_word_f1_is_a_symmetric_share(first, second):
    assert 0.0 <= word_f1(first, second) == word_f1(second, first) <= 1.0
    assert word_f1(first, first) == 1.0


def test_a_record_holds_what_was_kept():
    drawn = DrawnImage(0, "a/b.jpg", "a dog.", [])
    drawn.questions = [
        DrawnQuestion("Why?", "inconsistent", "no"),
        DrawnQuestion("Who?", "kept", "me", 1.0),
    ]
    assert DrawnImage.from_json(json.dumps(data_engine.asdict(drawn))) == drawn
    record = record_of(drawn)
    assert (record["id"], record["image"]) == ("a/b.jpg", "a/b.jpg")
    assert values(record) == [
        "<image>\nCan you describe the image in detail?",
        "a dog.",
        "Who?",
        "me",
    ]
    questions_alone = ["<image>\nWho?", "me"]
    drawn.number = 1
    assert values(record_of(drawn)) == questions_alone
    drawn.number, drawn.description = 3, None
    assert values(record_of(drawn)) == questions_alone
    drawn.questions.pop()
    assert record_of(drawn) is None


@given(st.integers(0, 9), st.integers(0, 4))
def test_one_record_in_so_many_begins_with_the_description(number, every):
    drawn = DrawnImage(number, "a.jpg", "a dog.", [DrawnQuestion("Who?", "kept", "me", 1.0)])
    described = ["<image>\nCan you describe the image in detail?", "a dog."]
    begins = values(record_of(drawn, every))[:2] == described
    assert begins == (every > 0 and number in range(0, 10, every))
    # The description is all there is to say.
    drawn.questions[0].verdict = "inconsistent"
    assert values(record_of(drawn, every)) == described


def values(record):
    return [turn["value"] for turn in record["conversations"]]


# --- kills ----------------------------------------------------------------------------------------


def command(model, folder, out, processes):
    words = ["--dataset", folder, "--out", out, "--model", model, "--processes", processes]
    words += ["-n", 2, "--batch", 4, "--max-new-tokens", 6, "--answer-tokens", 4]
    start = "from sqllava.cli import main; main()"
    return [sys.executable, "-c", start, "ask", *map(str, [*words, "--consistency", 1])]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_five_times_ends_with_each_image_once(talker, tmp_path, processes):
    folder, out = tmp_path / "images", tmp_path / "self_qa.json"
    folder.mkdir()
    for number in range(200):
        color = (number, 255 - number, number * 7 % 256)
        Image.new("RGB", (56, 56), color).save(folder / f"{number:03}.png")
    words = command(talker, folder, out, processes)
    parts = tmp_path / "self_qa.json.parts"
    rng = random.Random(processes)
    kills = 0
    while kills < 5:
        process = subprocess.Popen(
            words, env=environment(), start_new_session=True, stderr=subprocess.DEVNULL
        )
        _wait_for_lines(process, parts, 200 - len(_numbers(parts)), rng)
        assert process.poll() is None, "the run ended before it could be killed"
        if kills % 2:
            os.killpg(process.pid, signal.SIGKILL)  # all of its processes
        else:
            process.kill()  # the first one; the others have to notice
        process.wait()
        kills += 1
    assert not out.exists()
    assert subprocess.run(words, env=environment()).returncode == 0
    images = Counter(record["image"] for record in iter_records(out))
    assert images == Counter(f"{number:03}.png" for number in range(200))
    for number, record in enumerate(iter_records(out)):
        check_record(record, out, number)


def _numbers(parts):
    return {
        json.loads(line)["number"]
        for path in parts.glob("*.jsonl")
        for line in path.read_bytes().splitlines(keepends=True)
        if line.endswith(b"\n")
    }


def _wait_for_lines(process, parts, left, rng):
    """Waits until a run has written a random few more lines, and a random moment more."""
    wanted = len(_numbers(parts)) + rng.randint(0, max(0, min(left // 3, left - 40)))
    while process.poll() is None and len(_numbers(parts)) < wanted:
        time.sleep(0.01)
    time.sleep(rng.random() * 0.2)
