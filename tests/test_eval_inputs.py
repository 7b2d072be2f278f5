"""Benchmark files as people have them: other encodings and shapes, test splits, sheets.

Each gives the right value, or one line that names the file, the place and what would be right.
"""

import base64
import gzip
import json
import logging
import shutil
from pathlib import Path

import openpyxl
import pytest
from eval_data import dump, lines, mmbench_rows, read, ten, write_all, write_answers

from sqllava.eval import cli
from sqllava.eval.answers import read_picture
from sqllava.eval.records import read_answers
from sqllava.eval.score import read_answers_file, score
from sqllava.eval.tasks import get_task


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


def told(*words):
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as left:
        cli.main([str(word) for word in words])
    message = str(left.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def scored(capsys, *words):
    capsys.readouterr()
    cli.main(["score", *map(str, words)])
    return json.loads(capsys.readouterr().out)


# --- text -----------------------------------------------------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
OTHERS = {
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "save it as UTF-8": lambda data: data.decode().encode("utf-16-le"),
    "gzip": gzip.compress,
    "Git LFS pointer": lambda data: LFS,
    "HTML page": lambda data: b"\n<!DOCTYPE html><html>Sign in</html>",
    "zip archive": lambda data: b"PK\x03\x04" + data,
    "Parquet": lambda data: b"PAR1" + data,
    "line 1: byte 0xe9": lambda data: b'{"a": "caf\xe9"}\n' + data,
}


def sources(root):
    """(task, what is scored against, a file in it) for each kind of reader."""
    return [
        ("vqav2", "vqav2/annotations.json", "."),
        ("pope", "pope/coco", "coco_pope_random.json"),
        ("mme", "MME/MME_Benchmark_release_version", "color/0000.txt"),
        ("mmbench", "mmbench/mmbench_dev_20230712.tsv", "."),
    ]


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("what", OTHERS)
def test_a_file_that_is_no_text_is_named_and_told_apart(what, number, root, tmp_path):
    name, where, inner = sources(root)[number]
    task = get_task(name)
    questions = root / task.layout.folder / task.layout.questions
    answers = write_answers(tmp_path / "a.jsonl", task, questions, ["No"])
    copy = tmp_path / Path(where).name
    (shutil.copytree if (root / where).is_dir() else shutil.copy)(root / where, copy)
    bad = copy / inner
    bad.write_bytes(OTHERS[what](bad.read_bytes()))
    message = told("score", name, "--answers", answers, "--annotations", copy)
    assert str(bad) in message and what in message


@pytest.mark.parametrize("what", OTHERS)
def test_answers_and_questions_that_are_no_text_are_named(what, root, tmp_path):
    task = get_task("pope")
    questions = root / "pope/llava_pope_test.jsonl"
    answers = write_answers(tmp_path / "a.jsonl", task, questions, ["No"])
    good = answers.read_bytes()
    answers.write_bytes(OTHERS[what](good))
    message = told("score", "pope", "--answers", answers, "--annotations", root / "pope/coco")
    assert f"{answers}" in message and what in message
    bad = tmp_path / "q.jsonl"
    bad.write_bytes(OTHERS[what](questions.read_bytes()))
    answers.write_bytes(good)
    more = ("--annotations", root / "pope/coco", "--questions", bad)
    assert what in told("score", "pope", "--answers", answers, *more)


def test_a_byte_order_mark_changes_nothing(root, tmp_path):
    for name, where in (("vqav2", "annotations.json"), ("mmbench", "mmbench_dev_20230712.tsv")):
        task = get_task(name)
        questions = root / task.layout.folder / task.layout.questions
        answers = write_answers(tmp_path / f"{name}.jsonl", task, questions, ["B", "red"])
        right = score(task, answers, root / task.layout.folder / where, questions).metrics
        marked = []
        for path in (answers, root / task.layout.folder / where, questions):
            marked.append(tmp_path / f"bom_{name}_{path.name}")
            marked[-1].write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert score(task, *marked).metrics == right


def test_a_byte_that_is_not_utf8_is_named_by_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    good = b'{"question_id": 1, "text": "red"}\n'
    path.write_bytes(good * 20000 + good.replace(b"red", b"caf\xe9") + good)
    with pytest.raises(ValueError, match=r"a.jsonl, line 20001: byte 0xe9 after .*caf"):
        read_answers(path)


def test_empty_files_are_named(root, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    good = write_answers(
        tmp_path / "a.jsonl", get_task("pope"), root / "pope/llava_pope_test.jsonl", ["No"]
    )
    words = ("score", "pope", "--annotations", root / "pope/coco", "--answers")
    assert f"{empty} holds no answers" in told(*words, empty)
    assert f"{empty} holds no questions" in told(*words, good, "--questions", empty)
    words = ("score", "vqav2", "--answers", good, "--annotations")
    assert "empty.jsonl is empty" in told(*words, empty)
    words = ("score", "mmbench", "--answers", good, "--annotations")
    assert "empty.jsonl is empty" in told(*words, empty)


def test_json_of_the_other_kind_is_told(root, tmp_path):
    good = root / "pope/llava_pope_test.jsonl"
    listed = dump(tmp_path / "list.jsonl", read(good))
    words = ("score", "pope", "--annotations", root / "pope/coco", "--answers")
    assert "list.jsonl, line 1: a JSON list where JSON lines" in told(*words, listed)
    words = ("score", "vqav2", "--answers", good, "--annotations")
    assert "JSON lines, where one JSON value" in told(*words, good)
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    assert "nested too deeply" in told(*words, deep)


def test_windows_line_ends_change_nothing(root, tmp_path):
    task = get_task("mme")
    questions = root / "MME/llava_mme.jsonl"
    answers = write_answers(tmp_path / "a.jsonl", task, questions, ["Yes", "No"])
    release = shutil.copytree(root / "MME/MME_Benchmark_release_version", tmp_path / "release")
    right = score(task, answers, release).metrics
    for path in (answers, *release.rglob("*.txt")):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert score(task, answers, release).metrics == right
    tsv = tmp_path / "cc.tsv"
    tsv.write_bytes(b"a man .\r\na dog\thttp://y\r\n")
    cli.main(["prepare", "conceptual", str(tsv), "--out", str(tmp_path / "cc.jsonl")])
    assert [row["label"] for row in read(tmp_path / "cc.jsonl")] == ["a man .", "a dog"]


def test_check_names_what_is_there_and_of_no_use(root, tmp_path, capsys):
    folder = tmp_path / "pope"
    shutil.copytree(root / "pope", folder)
    shutil.rmtree(folder / "val2014")
    (folder / "val2014").mkdir()
    (folder / "llava_pope_test.jsonl").write_bytes(LFS)
    with pytest.raises(SystemExit):
        cli.main(["check", "pope", "--data", str(tmp_path)])
    said = capsys.readouterr().out
    assert "pope: 2 missing" in said
    assert "llava_pope_test.jsonl is a Git LFS pointer" in said
    assert "val2014 is an empty folder (6 GB)" in said


def test_file_names_and_answers_that_utf8_cannot_hold_are_escaped(tmp_path, capsysbinary):
    annotations = vqa_annotations(tmp_path / "a.json", "x")
    annotations.write_text(annotations.read_text().replace('"x"', r'"\ud800"'))
    answers = lines(tmp_path / "caf\udce9.jsonl", [{"question_id": 1, "text": "\ud800"}])
    items = tmp_path / "items.jsonl"
    words = ["--answers", str(answers), "--annotations", str(annotations), "--items", str(items)]
    cli.main(["score", "vqav2", *words, "--out", str(tmp_path / "s.json")])
    printed = json.loads(capsysbinary.readouterr().out)
    assert printed == json.loads((tmp_path / "s.json").read_text())
    assert printed["metrics"]["overall"] == 100 and printed["settings"]["answers"] == str(answers)
    cli.main(["submit", "vqav2", "--questions", str(questions_of(tmp_path)), *words[:2]])
    assert json.loads((tmp_path / "caf\udce9_submission.json").read_text()) == [
        {"question_id": 1, "answer": "\ud800"}
    ]


def questions_of(folder):
    return lines(folder / "q.jsonl", [{"question_id": 1, "text": "?"}])


# --- answers --------------------------------------------------------------------------------------


def vqa_annotations(path, *answers):
    entries = [
        {"question_id": n, "image_id": n, "question_type": "x", "answer_type": "number"}
        | {"answers": ten(answer)}
        for n, answer in enumerate(answers, 1)
    ]
    return dump(path, {"annotations": entries})


def test_numbers_are_answers_and_null_is_an_empty_one_and_counted(tmp_path, capsys, caplog):
    annotations = vqa_annotations(tmp_path / "a.json", "2", "2.5")
    answers = lines(
        tmp_path / "n.jsonl",
        [{"question_id": 1, "prompt": "x", "text": 2}, {"question_id": 2, "text": 2.5}],
    )
    words = ("vqav2", "--annotations", annotations, "--answers")
    found = scored(capsys, *words, answers)
    assert found["metrics"]["overall"] == 100 and "null_answers" not in found["counts"]
    lines(answers, [{"question_id": 1, "text": None}, {"question_id": 2.0, "text": "2.5"}])
    with caplog.at_level(logging.WARNING):
        found = scored(capsys, *words, answers)
    assert found["metrics"]["overall"] == 50 and found["counts"]["null_answers"] == 1
    assert "1 answers are null and count as empty, the first of question 1" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": 1, "text": ["2"]}, 'record 2: text must be a text, found a list ["2"]'),
        ({"question_id": 1, "text": True}, "record 2: text must be a text, found true"),
        ({"question_id": 1, "answer": "2"}, r"needs question_id and text, found [question_id, ans"),
        ({"text": "2"}, "needs question_id and text, found [text]"),
        ({"question_id": None, "text": "2"}, "question_id must be a text or a whole number, found"),
        ({"question_id": [1], "text": "2"}, "question_id must be a text or a whole number"),
        ({"question_id": 1, "text": "2", "prompt": ["x"]}, "prompt must be a text"),
        ({"question_id": 1, "text": "2", "metadata": "x"}, "metadata must be an object"),
        ({"img_path": "x.jpg", "response": "2"}, "the answer about 'x.jpg' has no question_id"),
    ],
)
def test_what_is_no_answer_is_told(row, message, tmp_path):
    annotations = vqa_annotations(tmp_path / "a.json", "2", "2")
    answers = lines(tmp_path / "n.jsonl", [{"question_id": 2, "text": "2"}, row])
    assert message in told("score", "vqav2", "--annotations", annotations, "--answers", answers)


def test_answers_without_a_prompt_are_told_where_it_is_the_key(root, tmp_path):
    answers = lines(tmp_path / "a.jsonl", [{"question_id": "a1", "text": "x"}])
    for name, where in (
        ("textvqa", "TextVQA_0.5.1_val.json"),
        ("mme", "MME_Benchmark_release_version"),
    ):
        folder = root / get_task(name).layout.folder
        message = told("score", name, "--answers", answers, "--annotations", folder / where)
        assert "'a1' has no prompt" in message


def test_ids_that_are_texts_in_one_file_and_numbers_in_the_other_meet(root, tmp_path):
    for name, where in (("vqav2", "annotations.json"), ("seed", "SEED-Bench.json")):
        task = get_task(name)
        folder = root / task.layout.folder
        answers = write_answers(tmp_path / "a.jsonl", task, folder / task.layout.questions, ["A"])
        right = score(task, answers, folder / where).metrics
        rows = [{**row, "question_id": str(row["question_id"])} for row in read(answers)]
        assert score(task, lines(tmp_path / "b.jsonl", rows), folder / where).metrics == right


# --- annotations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vqav2", [], "expected an object, found a list"),
        ("vqav2", {"annotations": {}}, "annotations must be a list, found an object"),
        ("vqav2", {"data": []}, "no 'annotations' (a list), found [data]"),
        ("vqav2", {"annotations": []}, "holds no records"),
        ("vqav2", {"annotations": [{"question_id": 1, "answers": ["red", 2]}, {"question_id": 2}]},
         "annotations, record 2: no 'answers', which 1 others have, found [question_id]"),
        ("vqav2", {"annotations": [{"question_id": 1, "answers": [{"text": "x"}]}]},
         "answers must be a list of texts, or of objects with an answer"),
        ("vizwiz", {"data": []}, "expected a list of records, found an object"),
        ("vizwiz", [1], "record 1: expected an object, found the number 1"),
        ("vizwiz", [{"answers": ["a"], "question": "?"}], "record 1: no 'image' (a text)"),
        ("textvqa", [], "expected an object, found a list"),
        ("textvqa", {"data": [{"answers": ["x"] * 10, "image_id": "1"}]}, "no 'question' (a text)"),
        ("textvqa", {"data": [{"answers": ["x"], "image_id": "1", "question": "?"}]},
         "data, record 1: expected 10 answers, found 1"),
        ("seed", {"questions": []}, "no 'question_type' (an object)"),
        ("seed", {"question_type": {"x": 1}, "questions": [{"question_id": "1", "answer": "A",
                  "question_type_id": 3, "data_type": "image"}]}, "one of question_type's [1]"),
        ("gqa", [], "expected an object, found a list"),
        ("gqa", {"1": {"question": "?", "answer": "a"}}, "1: no 'types' (an object)"),
        ("qbench", {}, "expected a list of records"),
        ("qbench", [{"question": "?", "candidates": ["a"], "img_path": "x", "correct_ans": "b"}],
         "correct_ans must be one of ['a'], found the text \"b\""),
        ("nocaps", {"info": {}}, "expected `images` and `annotations` of COCO"),
        ("nocaps", [{"picture": "x"}], "record 1: expected a caption or a label, found [picture]"),
        ("nocaps", [{"image": "x", "caption": [None]}], "caption must be a list of texts"),
    ],
)  # fmt: skip
def test_annotations_of_another_shape_are_told(name, value, message, tmp_path):
    annotations = dump(tmp_path / "annotations.json", value)
    ids = {"textvqa": "1", "vizwiz": 0, "qbench": 0}
    row = {"question_id": ids.get(name, 1), "text": "red", "prompt": "?\nx"}
    answers = lines(tmp_path / "a.jsonl", [row])
    words = ("--answers", answers, "--annotations", annotations, "--allow-missing")
    found = told("score", name, *words)
    assert str(annotations) in found and message in found


@pytest.mark.parametrize(
    ("name", "value", "upload"),
    [
        ("vqav2", {"questions": [{"question_id": 1, "question": "?", "image_id": 1}]},
         [{"question_id": 1, "answer": "red"}]),
        ("vizwiz", [{"image": "V.jpg", "question": "?"}], [{"image": "V.jpg", "answer": "red"}]),
        ("textvqa", {"data": [{"question_id": 5, "image_id": "1", "question": "What?"}]},
         [{"question_id": 5, "answer": "Red."}]),
        ("gqa", {"1": {"question": "?", "imageId": "n", "isBalanced": True}},
         [{"questionId": "1", "prediction": "red"}]),
        ("nocaps", {"images": [{"id": 1, "file_name": "0004886b.jpg"}], "info": {}},
         [{"image_id": 1, "caption": "Red."}]),
    ],
)  # fmt: skip
def test_a_split_without_answers_is_written_for_the_server(name, value, upload, tmp_path, capsys):
    annotations = dump(tmp_path / "annotations.json", value)
    row = {"question_id": 1 if name != "vizwiz" else 0, "text": "Red.", "prompt": "What?\nx"}
    answers = lines(tmp_path / "a.jsonl", [row])
    found = scored(capsys, name, "--answers", answers, "--annotations", annotations)
    assert "server" in found["settings"]["note"] and found["metrics"] == {}
    assert str(annotations) in found["settings"]["note"]
    assert json.loads((tmp_path / "a_submission.json").read_text()) == upload
    with pytest.raises(ValueError, match=f"write the upload with `sqllava eval submit {name}`"):
        score(get_task(name), answers, annotations)
    cli.main(["submit", name, "--answers", str(answers), "--annotations", str(annotations)])
    assert json.loads((tmp_path / "a_submission.json").read_text()) == upload


def test_a_split_that_is_not_there_is_told_with_those_that_are(root, tmp_path):
    folder = root / "scienceqa"
    answers = lines(tmp_path / "a.jsonl", [{"question_id": "5", "text": "A"}])
    for words in (
        ("score", "scienceqa", "--answers", answers, "--annotations", folder),
        ("prepare", "scienceqa", folder, "--out", tmp_path / "q.json"),
    ):
        message = told(*words, "--split", "minitest")
        assert "pid_splits.json has no split 'minitest'; there are ['test']" in message
    image = {"filename": "1.jpg", "split": "train", "sentences": [{"raw": "a"}]}
    karpathy = dump(tmp_path / "dataset.json", {"images": [image]})
    words = ("prepare", "flickr30k", karpathy, "--out", tmp_path / "q.jsonl")
    assert "has no split 'test'; there are ['train']" in told(*words)
    assert not (tmp_path / "q.jsonl").exists()


def test_scienceqas_problems_are_checked(root, tmp_path):
    problems = json.loads((root / "scienceqa/problems.json").read_text())
    dump(tmp_path / "pid_splits.json", {"test": ["5", "77"]})
    answers = lines(tmp_path / "a.jsonl", [{"question_id": "5", "text": "A"}])
    words = ("score", "scienceqa", "--answers", answers, "--annotations", tmp_path)
    dump(tmp_path / "problems.json", problems)
    assert "problems.json: no '77' (an object)" in told(*words)
    problems["77"] = {**problems["5"], "answer": 3}
    dump(tmp_path / "problems.json", problems)
    words = (*words, "--allow-missing")
    assert "problems.json, 77: answer must be the index of one of 2 choices" in told(*words)


# --- POPE -----------------------------------------------------------------------------------------


def pope_lists(folder, root, change):
    for path in (root / "pope/coco").iterdir():
        lines(folder / path.name, [change(row) for row in read(path)])
    return folder


def without(row, name):
    return {key: value for key, value in row.items() if key != name}


@pytest.mark.parametrize(
    "change",
    [
        lambda row: {**row, "label": row["label"].capitalize()},
        lambda row: {**row, "label": f" {row['label'].upper()}\n"},
        lambda row: {**without(row, "label"), "answer": row["label"]},
        lambda row: {**row, "question_id": str(row["question_id"])},
        lambda row: {**row, "question_id": float(row["question_id"]), "source": [1]},
    ],
)
def test_pope_labels_of_other_toolkits_give_the_same_figures(change, root, tmp_path):
    task = get_task("pope")
    questions = root / "pope/llava_pope_test.jsonl"
    answers = write_answers(tmp_path / "a.jsonl", task, questions, ["No", "Yes"])
    labels = pope_lists(tmp_path / "coco", root, change)
    for asked in (None, questions):
        found = score(task, answers, labels, asked).metrics
        assert [found[split]["f1"] for split in ("adversarial", "popular", "random")] == [1.0] * 3
        assert found["random"]["accuracy"] == 1.0 and found["f1_mean"] == 1.0
    cli.main(["prepare", "pope", str(labels), "--out", str(tmp_path / "q.jsonl")])
    key = {"key": lambda row: row["question_id"]}
    assert sorted(read(tmp_path / "q.jsonl"), **key) == sorted(read(questions), **key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: {**row, "label": "maybe"}, "record 1: label must be yes or no, found"),
        (lambda row: {**row, "label": True}, "label must be a text, found true"),
        (lambda row: without(row, "label"), "record 1: no 'label' (a text), found [question_id"),
        (lambda row: {**without(row, "text"), "question": "?"}, "no 'text' (a text)"),
        (lambda row: {**row, "question_id": f"q{row['question_id']}"}, "must be a whole number"),
        (lambda row: {**row, "question_id": 1}, "question_id 1 is there twice"),
    ],
)  # fmt: skip
def test_pope_labels_that_are_none_are_told(change, message, root, tmp_path):
    answers = lines(tmp_path / "a.jsonl", [{"question_id": 1, "text": "Yes"}])
    labels = pope_lists(tmp_path / "coco", root, change)
    found = told("score", "pope", "--answers", answers, "--annotations", labels)
    assert "coco_pope_adversarial.json, record" in found and message in found


# --- SEED-Bench-2 ---------------------------------------------------------------------------------


def test_seed_2_names_all_pictures_and_scores_under_its_own_kinds(tmp_path, capsys, caplog):
    choices = {f"choice_{letter}": letter for letter in "abcd"}
    entries = [
        {"answer": "A", **choices, "data_id": "454426", "data_type": "Single Image"}
        | {"question": "How many?", "question_id": "1_0", "question_type_id": 1},
        {"answer": "B", **choices, "data_id": ["a.png", "b.png"], "data_type": "Multiple Images"}
        | {"question": "What differs?", "question_id": "15_0", "question_type_id": 15},
    ]
    types = {"Scene Understanding": 1, "Difference Spotting": 15}
    source = dump(tmp_path / "v2.json", {"question_type": types, "questions": entries})
    out = tmp_path / "q.jsonl"
    with caplog.at_level(logging.WARNING):
        cli.main(["prepare", "seed", str(source), "--out", str(out)])
    assert "1 of 2 questions are about several pictures" in caplog.text
    assert [row["image"] for row in read(out)] == [
        "SEED-Bench-image/454426",
        ["SEED-Bench-image/a.png", "SEED-Bench-image/b.png"],
    ]
    first, second = get_task("seed").read_questions(out)
    assert first.fault is None and "2 pictures" in second.fault
    answers = write_answers(tmp_path / "a.jsonl", get_task("seed"), out, ["A", "B"])
    found = scored(capsys, "seed", "--answers", answers, "--annotations", source)["metrics"]
    assert (found["total"], found["Single Image"], found["Multiple Images"]) == (100, 100, 100)
    assert "image" not in found and "video" not in found


# --- question files -------------------------------------------------------------------------------


def test_a_list_of_one_picture_is_that_picture_and_several_are_told(tmp_path):
    path = lines(
        tmp_path / "q.jsonl",
        [
            {"question_id": 0, "image": ["a.jpg"], "text": "<image>\nWhat?"},
            {"question_id": 1, "image": ["a.jpg", "b.jpg"], "text": "<image>\n<image>\nWhat?"},
            {"question_id": 2, "image": [], "text": "What?"},
        ],
    )
    one, two, none = get_task("gqa").read_questions(path)
    assert (one.image, one.text, one.fault) == ("a.jpg", "What?", None)
    assert none.image is None and none.fault is None
    with pytest.raises(ValueError, match="about 2 pictures; one can be shown: a.jpg, b.jpg"):
        read_picture(two, tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": 1, "text": "?", "image": 5}, "image must be a picture's name, found the"),
        ({"question_id": 1, "text": "?", "image": [1.5, None]}, "image must be a list of texts"),
        ({"question_id": 1, "text": "?", "image": {"path": "x"}}, "image must be a picture's name"),
        ({"question_id": 1, "text": "?", "images": ["x"]}, "name goes under 'image', found [quest"),
        ({"question_id": 1, "text": "?", "img_path": "x"}, "name goes under 'image'"),
        ({"question_id": 1, "text": "<image>\n?"}, "name goes under 'image'"),
        ({"question_id": 1, "question": "?", "image": "x"}, "needs question_id and text"),
        ({"question_id": True, "text": "?"}, "question_id must be a text or a whole number"),
        ({"question_id": 1, "text": None}, "text must be a text, found null"),
    ],
)  # fmt: skip
def test_what_is_no_question_is_told(row, message, tmp_path):
    path = lines(tmp_path / "q.jsonl", [{"question_id": 0, "text": "?", "image": "a"}, row])
    with pytest.raises(ValueError) as found:
        get_task("gqa").read_questions(path)
    assert f"{path}, record 2: " in str(found.value) and message in str(found.value)


# --- captions -------------------------------------------------------------------------------------


def coco(path, ids=(1, 2, 3), captioned=(1, 2, 3), **change):
    images = [{"id": n, "file_name": f"COCO_val2014_{int(n):012d}.jpg"} for n in ids]
    notes = [{"id": n, "image_id": n, "caption": "a red square"} for n in captioned]
    return dump(path, {"images": images, "annotations": notes} | change)


def captions(path, count=3):
    return lines(path, [{"question_id": n, "text": "a red square"} for n in range(1, count + 1)])


def test_a_picture_without_captions_is_named(tmp_path):
    answers = captions(tmp_path / "a.jsonl")
    annotations = coco(tmp_path / "c.json", captioned=(1, 2))
    message = told("score", "coco", "--answers", answers, "--annotations", annotations)
    assert "1 of 3 pictures have no captions, such as 'COCO_val2014_000000000003.jpg'" in message


def test_captions_of_unlisted_pictures_are_left_out_as_cocos_reader_does(tmp_path, caplog):
    from sqllava.eval.tasks.captions import read_references

    annotations = coco(tmp_path / "c.json", ids=(1, 2))
    with caplog.at_level(logging.WARNING):
        assert [r.question_id for r in read_references(annotations)] == ["1", "2"]
    assert "captions of 1 pictures that `images` does not list" in caplog.text
    answers = captions(tmp_path / "a.jsonl")
    message = told("score", "coco", "--answers", answers, "--annotations", annotations)
    assert "no picture is known for question '3'" in message


def test_caption_ids_may_be_texts_and_the_list_of_pictures_may_be_missing(tmp_path):
    from sqllava.eval.tasks.captions import image_key, read_references

    texts = read_references(coco(tmp_path / "c.json", ids=("1", "2", "3")))
    assert [(r.question_id, len(r.captions)) for r in texts] == [("1", 1), ("2", 1), ("3", 1)]
    bare = dump(tmp_path / "b.json", {"annotations": [{"image_id": 7, "caption": "a"}] * 2})
    (only,) = read_references(bare)
    assert (only.key, only.captions) == ("7", ("a", "a"))
    assert image_key("COCO_val2014_000000000042.jpg") == "42" and image_key("0_²") == "0_²"


def test_nocaps_test_is_asked_about_and_uploaded_by_picture_id(tmp_path):
    images = [{"id": 10 + n, "file_name": f"{n}abc.jpg"} for n in range(2)]
    source = dump(tmp_path / "nocaps_test_image_info.json", {"images": images, "info": {}})
    out = tmp_path / "q.jsonl"
    cli.main(["prepare", "nocaps", str(source), "--out", str(out)])
    answers = write_answers(tmp_path / "a.jsonl", get_task("nocaps"), out, ["a house", "a dog"])
    words = ["--annotations", str(source), "--questions", str(out)]
    cli.main(["submit", "nocaps", "--answers", str(answers), *words])
    assert json.loads((tmp_path / "a_submission.json").read_text()) == [
        {"image_id": 10, "caption": "a house"},
        {"image_id": 11, "caption": "a dog"},
    ]


# --- tables ---------------------------------------------------------------------------------------


def table(path, rows, delimiter="\t"):
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    path.write_text("".join(delimiter.join(row) + "\n" for row in cells), encoding="utf-8")
    return path


PICTURE = mmbench_rows()[0]["image"]


def one(**change):
    return {"index": 1, "question": "Which?", "A": "red", "B": "blue", "answer": "A"} | change


def sheet(path, *rows):
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)
    return path


def test_sheets_as_they_come(tmp_path, capsys):
    annotations = table(tmp_path / "t.tsv", [one()])
    path = tmp_path / "s.xlsx"
    words = ("mmbench", "--answers", path, "--annotations", annotations)
    sheet(path, ["index", "response"], [1, "A"])
    message = told("score", *words)
    assert f"{path}: no column prediction; its columns are ['index', 'response']" in message
    sheet(path)
    assert f"{path} is empty" in told("score", *words)
    sheet(path, ["index", "prediction"])
    assert f"{path} has a header (index, prediction) and no rows" in told("score", *words)
    sheet(path, ["index", "prediction"], ["one", "A"])
    assert f"{path}, row 2: index must be a whole number, found" in told("score", *words)
    for rows in ([1, "A"], [None, None]), ([1.0, "A"],), (["1", "A"], []), (["1.0", "A"],):
        sheet(path, ["index", "prediction"], *rows)
        assert scored(capsys, *words)["metrics"]["circular_accuracy"] == 100
    path.write_bytes(b"PK\x03\x04" + path.read_bytes()[200:])
    assert str(path) in told("score", *words)
    path.write_bytes(LFS)
    assert f"{path} is a Git LFS pointer" in told("score", *words)


def test_answers_in_tables_of_text(tmp_path):
    rows = [{"index": 1, "prediction": "A"}, {"index": 2, "prediction": ""}]
    for name, delimiter in (("a.tsv", "\t"), ("a.csv", ",")):
        found = read_answers_file(table(tmp_path / name, rows, delimiter))
        assert [(row["question_id"], row["text"]) for row in found] == [(1, "A"), (2, "")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": 1, "question": "?"}], "no column index; its columns are ['id', 'question']"),
        ([one(), one()], "row 3: index 1 is there twice"),
        ([one(index="nan")], 'row 2: index must be a whole number, found the text "nan"'),
        ([one(answer="red")], "index 1: answer must be one of A, B, C, D, found 'red'"),
        ([one(), one(index=2, answer="nan")], "index 2: answer must be one of A, B, C, D, found"),
    ],
)
def test_tables_that_are_none_of_mmbench_are_told(rows, message, tmp_path):
    annotations = table(tmp_path / "t.tsv", rows)
    answers = lines(tmp_path / "a.jsonl", [{"question_id": 1, "text": "A"}])
    words = ("--answers", answers, "--annotations", annotations, "--allow-missing")
    found = told("score", "mmbench", *words)
    assert str(annotations) in found and message in found


def test_answers_that_pandas_wrote_as_nan_are_none(tmp_path):
    annotations = table(tmp_path / "t.tsv", [one(answer="nan")])
    answers = lines(tmp_path / "a.jsonl", [{"question_id": 1, "text": "A"}])
    with pytest.raises(ValueError, match=r"t.tsv has no public answers.*eval submit mmbench"):
        score(get_task("mmbench"), answers, annotations)


def test_control_characters_in_answers_reach_the_sheet_as_spaces(tmp_path, caplog, capsys):
    annotations = table(tmp_path / "t.tsv", [one()])
    text = "A\x0b red\x00 \ud800"
    answers = lines(tmp_path / "a.jsonl", [{"question_id": 1, "text": text}])
    words = ["--answers", str(answers), "--annotations", str(annotations)]
    with caplog.at_level(logging.WARNING):
        cli.main(["submit", "mmbench", *words, "--out", str(tmp_path / "s.xlsx")])
    assert "in 1 cells control characters became spaces" in caplog.text
    header, row = openpyxl.load_workbook(tmp_path / "s.xlsx").active.values
    assert dict(zip(header, row, strict=True))["prediction"] == "A  red   "
    found = scored(capsys, "mmbench", "--answers", tmp_path / "s.xlsx", *words[2:])
    assert found["metrics"]["circular_accuracy"] == 100


def test_a_text_that_is_too_long_for_a_cell_is_cut_with_a_word(tmp_path, caplog):
    from sqllava.eval.tables import read_table, write_sheet

    with caplog.at_level(logging.WARNING):
        write_sheet(tmp_path / "s.xlsx", ["a"], [{"a": "x" * 40_000}, {"a": "=1"}])
    assert "in 1 cells" in caplog.text and "cut to 32767 characters" in caplog.text
    assert [len(row["a"]) for row in read_table(tmp_path / "s.xlsx")] == [32_767, 2]


def test_an_upload_that_lacks_answers_names_no_flag_that_it_has_not(tmp_path):
    annotations = table(tmp_path / "t.tsv", [one(), one(index=2)])
    answers = lines(tmp_path / "a.jsonl", [{"question_id": 1, "text": "A"}])
    message = told("submit", "mmbench", "--answers", answers, "--annotations", annotations)
    assert "'2' (--allow-missing is for scores: an upload needs every answer)" in message


CELLS = {
    "images/0001.jpg": "is a path, 'images/0001.jpg', not",
    "https://example.org/mmbench/0001.jpg": "is an address, 'https://example.org",
    "https://example.org/" + "a" * 80 + ".jpg": "is an address, 'https://example.org",
    "": "cell is empty",
    PICTURE + "A": "is not base64 (",
    PICTURE[:40].replace("i", "*") + "*": "is not base64 (",
    base64.b64encode(b"no picture" * 20).decode(): "holds no image that can be read",
    "12345": "is not base64",
}


@pytest.mark.parametrize("cell", CELLS)
def test_one_cell_without_a_picture_is_that_questions_fault_alone(cell, tmp_path):
    source = table(tmp_path / "t.tsv", [one(image=PICTURE), one(index=2, image=cell)])
    good, bad = get_task("mmbench").read_questions(source)
    assert read_picture(good, None).mode == "RGB"
    with pytest.raises(ValueError) as found:  # an ImageError, which --bad-images mark goes past
        read_picture(bad, None)
    assert CELLS[cell] in str(found.value)
    message = told("prepare", "mmbench", source, "--out", tmp_path / "q.jsonl")
    assert f"{source}, index 2: " in message and CELLS[cell] in message
    assert [path.name for path in tmp_path.iterdir()] == ["t.tsv"]


def test_pictures_as_data_addresses_and_in_turned_rows_are_shown(tmp_path):
    rows = [one(image="data:image/png;base64," + PICTURE), one(index=1_000_001, image="1")]
    source = table(tmp_path / "t.tsv", rows)
    first, turned = get_task("mmbench").read_questions(source)
    assert read_picture(first, None).tobytes() == read_picture(turned, None).tobytes()
    cli.main(["prepare", "mmbench", str(source), "--out", str(tmp_path / "q.jsonl")])
    (picture,) = (tmp_path / "q_images").iterdir()
    assert picture.read_bytes() == base64.b64decode(PICTURE)


def test_a_table_without_a_column_of_pictures_is_told(tmp_path):
    source = table(tmp_path / "t.tsv", [one(image_path="1.jpg")])
    message = told("prepare", "mmbench", source, "--out", tmp_path / "q.jsonl")
    assert "no column image; its columns are ['index'" in message and "'image_path']" in message


def test_a_folder_or_nothing_in_a_files_place_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    given = ["score", "vqav2", "--answers", str(path), "--annotations", str(path)]
    with pytest.raises(SystemExit, match=f"error: no such file: {path}$"):
        cli.main(given)
    path.mkdir()
    with pytest.raises(SystemExit, match=f"error: {path} is a folder, where a file is expected$"):
        cli.main(given)
