"""Measures of asking, on questions whose figures are known."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqllava.eval.selfq import (
    Asked,
    bleu,
    distinct_n,
    is_question,
    main,
    measure,
    overlap,
    read_questions,
    self_bleu,
    truth,
)


def asked(*texts):
    return [Asked(text) for text in texts]


def test_distinct_n_is_the_share_of_different_n_grams():
    questions = asked("What is it?", "what is that")
    assert distinct_n(questions, 1) == pytest.approx(4 / 6)
    assert distinct_n(questions, 2) == pytest.approx(3 / 4)
    assert distinct_n(asked("Why?"), 2) is None


def test_self_bleu_is_one_for_repeats_and_low_for_others():
    assert self_bleu(asked("What color is the cat?", "what color is the cat?")) == pytest.approx(1)
    assert self_bleu(asked("What color is the cat?", "Who lives next door to him")) < 0.2
    assert self_bleu(asked("Why?")) is None


def test_bleu_is_that_of_the_library():
    from sacrebleu import sentence_bleu

    text, references = "where is the big dog ?", ["where is the dog ?", "who is the big man ?"]
    assert bleu(text, references) == pytest.approx(sentence_bleu(text, references).score / 100)


def test_a_question_is_one_line_with_a_question_mark():
    assert is_question("Is it?")
    assert not any(map(is_question, ["It is.", "?", "", "Two\nlines?", "Is it"]))


def test_overlap_counts_by_image_and_leaves_out_images_without_references():
    run = {"a": asked("Is it red?", "Why?"), "b": asked("Is it red?"), "c": asked("Who?")}
    references = {"a": asked("is it red", "Where is it?"), "b": asked("Why?")}
    figures = overlap(run, references)
    assert figures["reference_exact"] == pytest.approx(1 / 3)
    assert figures["reference_recall"] == pytest.approx(1 / 3)
    assert 0 < figures["reference_bleu"] < 1


def test_truth_is_a_share_and_right_is_one_of_the_grounded():
    def checked(well_formed, grounded, right):
        return Asked("?", {"well_formed": well_formed, "grounded": grounded, "right": right})

    questions = [checked(True, True, True), checked(True, False, False), checked(True, True, False)]
    assert truth(questions) == {"well_formed": 1, "grounded": pytest.approx(2 / 3), "right": 0.5}
    assert truth(asked("?")) == {}


def test_runs_of_all_kinds_are_read(tmp_path):
    question = {"text": "Who?", "well_formed": True, "grounded": True, "right": False}
    turns = [
        {"from": "human", "value": "<image>\nCan you describe the image in detail?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Who?"},
        {"from": "gpt", "value": "It."},
    ]
    records = [
        {"image": "a", "description": "x", "exchanges": [{"question": "Who?", "answer": None}]},
        {"number": 0, "image": "a", "questions": [question]},
        {"id": "a", "image": "a", "conversations": turns},
    ]
    for record in records:
        path = tmp_path / "run.json"
        path.write_text(json.dumps([record]))
        assert [one.text for one in read_questions(path)["a"]] == ["Who?"]
    (tmp_path / "text.json").write_text(json.dumps([{"id": "t", "conversations": turns[2:]}]))
    assert read_questions(tmp_path / "text.json") == {}
    (tmp_path / "other.json").write_text('[{"image": "a", "said": 1}]')
    with pytest.raises(ValueError, match=r"other.json: record 0 holds no questions"):
        read_questions(tmp_path / "other.json")


def test_a_run_becomes_figures_and_a_picture(tmp_path, capsys):
    run = [
        {"image": name, "exchanges": [{"question": text, "answer": ""} for text in texts]}
        for name, texts in {"a": ["What is it?", "Who is it?"], "b": ["What is it?"]}.items()
    ]
    path, out, picture = tmp_path / "run.jsonl", tmp_path / "out.json", tmp_path / "picture.png"
    path.write_text("\n".join(map(json.dumps, run)))
    main([str(path), "--references", str(path), "--out", str(out), "--picture", str(picture)])
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(out.read_text())
    assert report["task"] == "selfq"
    assert report["counts"] == {"images": 2, "questions": 3, "images_with_references": 2}
    assert report["metrics"]["reference_exact"] == report["metrics"]["question_share"] == 1
    assert report["metrics"]["questions_per_image"] == 1.5
    assert report["metrics"]["words_mean"] == 3
    assert report["first_words"] == {"what": pytest.approx(2 / 3), "who": pytest.approx(1 / 3)}
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="no such data file"):
        main([str(tmp_path / "nowhere.json")])


@given(st.dictionaries(st.text(max_size=2), st.lists(st.text(max_size=12), max_size=4), max_size=3))
def test_figures_are_known_or_none_whatever_is_asked(texts):
    run = {image: asked(*several) for image, several in texts.items()}
    figures = measure(run, run)
    for name in ("distinct_1", "distinct_2", "self_bleu", "question_share", "reference_exact"):
        assert figures[name] is None or 0 <= figures[name] <= 1.0000001
