"""Bootstrap intervals and comparisons: copies count as often as drawn, and the intervals hold."""

import random

import numpy as np
import pytest
from eval_data import dump, lines, write_all, write_answers

from sqllava.eval.metrics import yesno
from sqllava.eval.metrics.judged import llavabench_metrics, mmvet_metrics
from sqllava.eval.score import compare, intervals, score
from sqllava.eval.tasks import TASKS, get_task

ANNOTATIONS = {"vqav2": "vqav2/annotations.json", "vizwiz": "vizwiz/val.json"}
JAVA = ("coco", "flickr30k", "nocaps", "conceptual")


def pair(image, right, subtask="count"):
    """A picture's two questions of MME, answered rightly or not."""
    answers = ("yes", "no")
    return [
        {
            "question_id": f"{subtask}/{image}",
            "subtask": subtask,
            "image": image,
            "pair": f"{subtask}/{image}",
            "prompt": f"{answer}?",
            "prediction": answer if good else "other",
            "answer": answer,
            "score": float(good),
        }
        for answer, good in zip(answers, right, strict=True)
    ]


def test_a_pair_drawn_three_times_counts_three_times():
    sample = pair("a", (True, True)) * 3 + pair("b", (False, True))
    figures = yesno.mme_metrics(sample)["subtasks"]["count"]
    assert (figures["acc_plus"], figures["acc"]) == (0.75, 7 / 8)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


def items_of(name, root, folder):
    """A task's items for answers that are right now and then."""
    task, options, answers = TASKS[name], {}, None
    layout = root / task.layout.folder
    annotations = root / ANNOTATIONS.get(name, f"{task.layout.folder}/{task.layout.annotations}")
    if name == "llavabench":
        rows = [
            {
                "question_id": n,
                "category": f"llava_bench_{kind}",
                "content": "",
                "tuple": [8, 2 * n],
            }
            for n, kind in enumerate(("conv", "detail", "complex"))
        ]
        options = {"reviews": str(lines(folder / "reviews.jsonl", rows))}
    elif name == "mmvet":
        grades = {
            f"v1_{n}": {"model": ["g"] * 2, "content": [""] * 2, "score": [n / 5, n / 4]}
            for n in range(4)
        }
        options = {"grades": str(dump(folder / "grades.json", grades))}
    else:
        texts = ["red", "yes", "B", "No", "A", "Low"]
        questions = layout / task.layout.questions
        answers = write_answers(folder / "a.jsonl", task, questions, texts)
    questions = layout / task.layout.questions
    return score(task, answers, annotations, questions, options).items


def apart(sample):
    """A sample whose copies are different pictures, questions and pairs."""
    names = ("question_id", "image", "pair", "unit", "data_id")
    return [
        {**item, **{name: f"{item[name]}#{copy}" for name in names if item.get(name)}}
        for copy, unit in enumerate(sample)
        for item in unit
    ]


@pytest.mark.parametrize("name", [name for name in TASKS if name not in JAVA])
def test_copies_in_a_resample_count_as_if_they_were_different(name, root, tmp_path):
    task = TASKS[name]
    items = items_of(name, root, tmp_path)
    units = {}
    for item in items:
        units.setdefault(item["unit"], []).append(item)
    rng = random.Random(name)
    for _ in range(20):
        sample = rng.choices(list(units.values()), k=len(units) + 2)
        flat = [item for unit in sample for item in unit]
        assert task.summarize(flat, {}) == task.summarize(apart(sample), {})


@pytest.mark.parametrize("name", [name for name in TASKS if name not in JAVA])
def test_every_headline_has_an_interval_around_it(name, root, tmp_path):
    task = TASKS[name]
    items = items_of(name, root, tmp_path)
    figure, interval = task.summarize(items, {}), intervals(task, items, {}, 60)
    for key in task.headline:
        figure, interval = figure[key], interval[key]
    low, high = interval
    assert low <= figure <= high
    assert intervals(task, items, {}, 60) == intervals(task, items, {}, 60)


def test_captions_keep_the_weights_of_the_whole_set_in_a_resample():
    """Else a resample of one picture alone would have a CIDEr of 0."""
    items = [
        {"question_id": str(n), "rouge_l": 0.5, "cider": float(n), "domain": None} for n in range(3)
    ]
    found = get_task("coco").resample([items[2]] * 3 + [items[0]], {})
    assert (found["cider"], found["by_domain"]) == (1.5, {})
    for item, domain in zip(items, ("in-domain", "in-domain", "out-domain"), strict=True):
        item |= {"domain": domain, "cider_in_domain": 2 * item["cider"]}
    found = intervals(get_task("nocaps"), items * 10, {}, 50)
    low, high = found["by_domain"]["in-domain"]["cider"]
    assert 0 <= low < 1 < high <= 2 and found["by_domain"]["out-domain"]["cider"] == [4.0, 4.0]


def test_parts_of_a_score_have_intervals_under_their_own_names():
    rng = random.Random(0)
    reviews = [
        {
            "question_id": n,
            "category": ("conv", "detail")[n % 2],
            "reference": 8.0,
            "candidate": float(rng.randint(3, 9)),
        }
        for n in range(40)
    ]
    found = intervals(get_task("llavabench"), reviews, {}, 200)
    figures = llavabench_metrics(reviews)
    for part in ("all", "conv", "detail"):
        low, high = found[part]["ratio"]
        assert low < figures[part]["ratio"] < high
    assert "count" not in found["all"] and "failed" not in found
    graded = [
        {"question_id": n, "capability": [("ocr", "math")[n % 2]], "scores": [rng.random()]}
        for n in range(40)
    ]
    found = intervals(get_task("mmvet"), graded, {}, 200)
    low, high = found["by_capability"]["ocr"]
    assert low < mmvet_metrics(graded)["by_capability"]["ocr"] < high


def mme_world(rng, count):
    """Pictures of which the model knows 60 %; of the others it guesses."""
    worlds = []
    for n in range(count):
        knows = rng.random() < 0.6
        worlds += pair(str(n), [knows or rng.random() < 0.3 for _ in range(2)])
    return worlds


def test_intervals_are_as_wide_as_the_scores_spread_and_hold_the_truth():
    """Many data sets of one world: 95 % of the intervals must hold the world's own score.

    Where a pair's copies are one, they are a fifth too narrow, and hold it in about 88 %.
    """
    rng, task, pictures = random.Random(1), get_task("mme"), 30
    # What a picture adds, 200, 50 or 0, and how often: both right, one right, none.
    adds = np.array([200.0, 50.0, 0.0])
    often = np.array([0.6 + 0.4 * 0.09, 0.4 * 0.42, 0.4 * 0.49])
    truth = float(adds @ often)
    spread = ((adds**2 @ often - truth**2) / pictures) ** 0.5
    widths, held = [], 0
    for seed in range(100):
        items = mme_world(rng, pictures)
        low, high = intervals(task, items, {}, 120, seed)["by_subtask"]["count"]
        widths.append(high - low)
        held += low <= truth <= high
    assert np.mean(widths) / (2 * 1.96 * spread) == pytest.approx(1, abs=0.07)
    assert held >= 90


def comparable(scores, unit):
    return [
        {"question_id": str(n), "unit": unit(n), "score": float(value)}
        for n, value in enumerate(scores)
    ]


def test_compared_runs_are_drawn_by_picture():
    """Ten questions a picture, answered alike: no more is known than from one question each."""
    rng = random.Random(0)
    better = [rng.random() < 0.5 for _ in range(30)]

    def together(n):
        return str(n // 10)

    first = comparable([0] * 300, together)
    second = comparable([better[n // 10] for n in range(300)], together)
    found = compare(first, second)
    alone = compare(comparable([0] * 30, str), comparable(better, str))
    assert (found["items"], found["units"], alone["units"]) == (300, 30, 30)
    assert found["interval_95"] == pytest.approx(alone["interval_95"])
    assert found["difference"] == alone["difference"] == np.mean(better)
    low, high = found["interval_95"]
    naive_low, naive_high = compare(
        comparable([0] * 300, str), comparable([better[n // 10] for n in range(300)], str)
    )["interval_95"]
    assert high - low > 2.5 * (naive_high - naive_low)


def test_compared_items_without_a_number_are_named():
    good = comparable([1, 0], str)
    for value in (None, float("nan"), "1", True):
        bad = [good[0], {**good[1], "score": value}]
        with pytest.raises(ValueError, match="record 2: an item to compare needs"):
            compare(good, bad)
    with pytest.raises(ValueError, match="'0' is there more than once"):
        compare(good, [good[0], good[0]])
