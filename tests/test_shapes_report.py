"""The quickstart's report and evaluation on small made-up results: whole, self-contained, right."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

SHAPES = Path(__file__).resolve().parent.parent / "demo" / "shapes"


@pytest.fixture(scope="module")
def shapes():
    """The demo's modules, which live in a folder of scripts."""
    sys.path.insert(0, str(SHAPES))
    try:
        import evaluate
        import report
        import world

        yield evaluate, report, world
    finally:
        sys.path.remove(str(SHAPES))


def _scene(world):
    return world.Scene(
        (world.Thing("small", "red", "circle", 0), world.Thing("large", "blue", "star", 5))
    )


ASKED = (
    ("What color is the star?", "blue"),
    ("What color is the star?", "blue"),
    ("What size is the circle?", "large"),
    ("Where is the square?", "north"),
    ("What <b>is</b> the?", "yes"),
)


@pytest.fixture
def run(shapes, tmp_path):
    """A run's folder, as the quickstart leaves it."""
    evaluate, _, world = shapes
    scene = _scene(world)
    (tmp_path / "data/eval/images").mkdir(parents=True)
    asked = []
    for number in range(26):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"data/eval/images/{number}.jpg")
        questions = [evaluate.check(text, said, scene) for text, said in ASKED]
        truth = world.describe(scene)
        description = truth if number % 2 else "a <script>"
        asked.append(
            {
                "image": f"{number}.jpg",
                "description": description,
                "truth": truth,
                "questions": questions,
            }
        )
    row = {"question_id": 0, "image": "0.jpg", "text": "?", "answer": "red", "kind": "color"}
    right = {**row, "unseen_pair": True, "said": "red", "right": True}
    wrong = {**row, "unseen_pair": False, "said": "blue", "right": False}
    figures = {
        **evaluate.figures_of_answers([right, wrong], [wrong, wrong]),
        **evaluate.figures_of_asking(asked),
        "scenes": 26,
        "questions": 2,
        "asked_scenes": 26,
        "benchmarks": {"VQA accuracy": 0.5, "POPE mean F1": 0.25},
    }
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/asked.json").write_text(json.dumps(asked))
    (tmp_path / "eval/figures.json").write_text(json.dumps(figures))
    for stage in ("stage1", "stage2"):
        (tmp_path / stage).mkdir()
        history = [{"step": step, "loss": f"{9 / step:.3f}"} for step in range(1, 40)]
        state = {"log_history": [*history, {"step": 39, "train_loss": 1.0}]}
        (tmp_path / stage / "trainer_state.json").write_text(json.dumps(state))
    return tmp_path


class _Page(HTMLParser):
    """Checks that tags nest, and gathers addresses and counts."""

    EMPTY = {"meta", "img", "br", "line", "polyline"}

    def __init__(self) -> None:
        super().__init__()
        self.open, self.addresses, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag


def test_the_report_holds_all_it_shows(shapes, run):
    _, report, _ = shapes
    report.write_report(run, run / "report", seconds=65)
    text = (run / "report/index.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert len(page.addresses) == 26
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
    assert not re.search(r"https?:|@import|url\(|<script|\{\{", text)
    assert page.tags.count("article") == report.PICTURES == 24
    assert page.tags.count("svg") == 2
    assert page.tags.count("polyline") == 4
    assert "1:05" in text


def test_wrong_and_odd_questions_are_marked(shapes, run):
    evaluate, report, world = shapes
    lines = {
        text: report.question_line(evaluate.check(text, said, _scene(world)))
        for text, said in ASKED
    }
    assert "✓" in lines["What color is the star?"]
    assert "✗" in lines["What size is the circle?"]
    assert "it is small" in lines["What size is the circle?"]
    assert "not about this picture" in lines["Where is the square?"]
    assert "not a question" in lines["What <b>is</b> the?"]
    assert "&lt;b&gt;" in lines["What <b>is</b> the?"]


def test_figures_count_what_they_say(shapes, run):
    _, report, _ = shapes
    report.write_report(run, run / "report")
    figures = json.loads((run / "report/figures.json").read_text())
    assert figures["vqa_accuracy"] == 0.5
    assert figures["vqa_accuracy_unseen_pairs"] == 1.0
    assert figures["vqa_accuracy_shuffled_images"] == 0.0
    assert figures["vqa_by_kind"] == {"color": {"questions": 2, "plain": 0.5, "shuffled": 0.0}}
    assert figures["ask_well_formed"] == 0.8
    assert figures["ask_grounded"] == 0.6
    assert figures["ask_self_answer_correct"] == 0.6667
    assert figures["ask_distinct_of_8"] == 4.0
    assert figures["ask_by_kind"]["place"] == {"asked": 26, "grounded": 0.0, "right": None}
    assert "answers right" in report.summary(figures)
    assert "seconds" not in figures


def test_a_run_without_a_curve_or_a_figure_still_gives_a_report(shapes, run):
    _, report, _ = shapes
    (run / "stage1/trainer_state.json").write_text(json.dumps({"log_history": []}))
    figures = json.loads((run / "eval/figures.json").read_text())
    figures["ask_self_answer_correct"] = None
    (run / "eval/figures.json").write_text(json.dumps(figures))
    report.write_report(run, run / "report")
    assert "too few points" in (run / "report/index.html").read_text()


def test_other_images_are_never_the_same(shapes):
    evaluate, _, _ = shapes
    rows = [{"question_id": n, "image": f"{n // 3}.jpg"} for n in range(30)]
    shuffled = evaluate.with_other_images(rows)
    assert all(a["image"] != b["image"] for a, b in zip(rows, shuffled, strict=True))
    assert sorted(row["image"] for row in shuffled) == sorted(row["image"] for row in rows)
    with pytest.raises(ValueError, match="at least 2 pictures, found 1"):
        evaluate.with_other_images(rows[:2])


def test_exact_match_forgives_only_case_spaces_and_a_full_stop(shapes):
    evaluate, _, _ = shapes
    assert evaluate.same(" Red. ", "red")
    assert not evaluate.same("dark red", "red")
    assert not evaluate.same("", "red")
