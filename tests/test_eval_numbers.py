"""What is printed: numbers that are numbers, units as specified, counts of what is not in."""

import json

import pytest
from eval_data import dump, lines, write_all, write_answers

from sqllava.eval import cli
from sqllava.eval.records import line, to_json, write_json
from sqllava.eval.report import examples, write_report
from sqllava.eval.score import headline, score
from sqllava.eval.tasks import TASKS, get_task

NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


def strict(text):
    """JSON as the standard has it: NaN and Infinity are none."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_no_number_is_null_in_every_file(tmp_path):
    value = {"a": NAN, "b": [INFINITY, 1.5], "c": {"d": (-INFINITY, 2)}, "e": "nan"}
    expected = {"a": None, "b": [None, 1.5], "c": {"d": [None, 2]}, "e": "nan"}
    write_json(tmp_path / "x.json", value)
    for text in (to_json(value), line(value), (tmp_path / "x.json").read_text()):
        assert strict(text) == expected


@pytest.mark.parametrize(
    ("reviews", "sentence"),
    [
        ([{"question_id": 0, "category": "conv", "tuple": [NAN, 8]}], "none of 1 reviews"),
        ([{"question_id": 0, "category": "conv", "tuple": [80, 90]}], "none of 1 reviews"),
        ([{"question_id": 0, "category": "conv", "tuple": ["8", "9"]}], "record 1: .*two numbers"),
        ([{"question_id": 0, "category": "conv"}], "record 1: a review needs a tuple or a content"),
        (
            [{"question_id": 0, "tuple": [8, 9]}],
            "record 1: a review needs question_id and category",
        ),
        ([], "none of 0 reviews"),
    ],
)
def test_reviews_that_give_no_figure_are_an_error(reviews, sentence, tmp_path):
    path = lines(tmp_path / "reviews.jsonl", reviews)
    with pytest.raises(SystemExit, match=f"^error: {path}.*{sentence}"):
        cli.main(["score", "llavabench", "--reviews", str(path), "--annotations", str(tmp_path)])


@pytest.mark.parametrize(
    ("grades", "sentence"),
    [
        ([], "expected an object of grades by id, found list"),
        ({"v1_0": [0.5]}, "v1_0: expected {.score.: "),
        ({"v1_0": {"score": [5]}}, "v1_0: a score is a number of 0 to 1, found 5"),
        ({"v1_0": {"score": [NAN]}}, "v1_0: a score is a number of 0 to 1, found nan"),
        ({"v1_0": {"score": ["0.5"]}}, "v1_0: a score is a number of 0 to 1, found '0.5'"),
        ({"v1_0": {"score": [True]}}, "v1_0: a score is a number of 0 to 1, found True"),
        ({"v1_0": {"score": [0.5], "content": []}}, "v1_0: not as many content as scores"),
        ({"v1_0": {"score": [None]}}, "none of the grades of 1 questions is a number"),
        ({"v1_0": {"score": [0.5]}, "v1_1": {"score": [0.5, 1]}}, "not all questions have as many"),
        ({}, "none of the grades of 0 questions"),
    ],
)
def test_grades_that_give_no_figure_are_an_error(grades, sentence, root, tmp_path):
    path = dump(tmp_path / "grades.json", grades)
    words = ["--grades", str(path), "--annotations", str(root / "mm-vet"), "--allow-missing"]
    with pytest.raises(SystemExit, match=f"^error: {path}.*{sentence}"):
        cli.main(["score", "mmvet", *words])


def test_missing_grades_are_counted_and_left_out_or_zero_as_in_the_official_script(
    root, tmp_path, capsys
):
    path = dump(tmp_path / "grades.json", {"v1_1": {"score": [0.5]}})
    words = ["score", "mmvet", "--grades", str(path), "--annotations", str(root / "mm-vet")]
    with pytest.raises(SystemExit, match=r"3 of 4 answers are missing.*leaves them out"):
        cli.main(words)
    for more, total, kinds in (
        ([], 50.0, {"gen": None, "rec": 50.0}),
        (["--unreadable", "zero"], 12.5, {"gen": 0.0, "rec": 25.0}),
    ):
        cli.main([*words, "--allow-missing", *more])
        printed = strict(capsys.readouterr().out)
        assert printed["metrics"]["total"] == total
        assert printed["metrics"]["by_capability"].items() >= kinds.items()
        assert (printed["counts"]["items"], printed["counts"]["missing"]) == (4, 3)
        assert printed["counts"]["failed"] == 0


@pytest.mark.parametrize("name", ["pope", "mme", "gqa", "textvqa", "mmbench", "seed", "qbench"])
def test_missing_answers_are_counted_and_said(name, root, tmp_path, caplog):
    task = TASKS[name]
    folder = root / task.layout.folder
    questions = folder / task.layout.questions
    rows = write_answers(tmp_path / "a.jsonl", task, questions).read_text().splitlines(True)
    (tmp_path / "a.jsonl").write_text("".join(rows[1:]))
    annotations = folder / (task.layout.annotations or "")
    found = score(task, tmp_path / "a.jsonl", annotations, questions, allow_missing=True)
    assert found.counts["missing"] == 1 and found.counts["answers"] == len(rows) - 1
    assert "1 of the items have no answer" in caplog.text


def test_headlines_are_in_the_papers_units():
    scales = {name for name, task in TASKS.items() if task.scale != 1}
    captions = {"coco", "flickr30k", "nocaps", "conceptual"}
    assert scales == {"pope", "qbench", "qbench_zh"} | captions
    assert headline(get_task("pope"), {"f1_mean": 0.859}) == pytest.approx(85.9)
    assert headline(get_task("gqa"), {"accuracy": 62.0}) == 62.0
    assert headline(get_task("gqa"), {"accuracy": NAN}) is None
    assert headline(get_task("mmvet"), {"total": None}) is None


def test_the_report_says_what_is_left_out_and_prints_no_nan(tmp_path):
    settings, counts = {"run": {}}, {"items": 60, "failed": 2, "missing": 1}
    dump(
        tmp_path / "llavabench.score.json",
        {"metrics": {"all": {"ratio": 70.1}}, "counts": counts, "settings": settings},
    )
    (tmp_path / "gqa.score.json").write_text(
        '{"metrics": {"accuracy": NaN}, "counts": {"items": 3}, "settings": {"run": null}}'
    )
    table = write_report(tmp_path, tmp_path / "out")
    assert "| 70.1 |" in table and "60 (3 without)" in table and "nan" not in table.lower()
    assert strict((tmp_path / "out/report.json").read_text())["table"][0]["ours"] is None
    assert "NaN" not in (tmp_path / "out/report.html").read_text()


@pytest.mark.parametrize("content", ["[]", "{}", '{"metrics": {}, "counts": {}}', "3"])
def test_a_file_that_is_no_score_is_named(content, tmp_path):
    (tmp_path / "gqa.score.json").write_text(content)
    with pytest.raises(SystemExit, match=r"^error: .*gqa.score.json: a score needs an object"):
        cli.main(["report", str(tmp_path)])


def test_items_without_a_score_are_open_in_the_examples():
    items = [{"question_id": n, "score": value} for n, value in enumerate((None, 1.0, 0.0))]
    assert {item["question_id"] for item in examples(items)} == {0, 1, 2}
