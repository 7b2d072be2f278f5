"""The benchmarks' metrics against outputs of the official scorers and their definitions."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqllava.eval.metrics import choices, gqa, judged, vqa, yesno

# Input, official VQA, EvalAI (None: the same).
NORMALISED = [
    ("The Dog's bowl", "dog's bowl", "dog 's bowl"),
    ("it's", "it's", "it 's"),
    ("let's lets", "let's lets", "let 's lets"),
    ("hello,world", "hello world", "helloworld"),
    ("1,2-3", "123", "12 3"),
    ("one,two 1,2", "onetwo 12", None),
    ("hello, world", "hello world", None),
    ("1,000", "1000", None),
    ("10,000,000", "10000000", None),
    ("2:30 p.m.", "2:30 pm", None),
    ("$5.99", "$5.99", None),
    ("3.5", "3.5", None),
    (".5", ".5", None),
    ("5.", "5", None),
    ("no.1", "no.1", None),
    ("e.g. 3.14.", "eg 3.14", None),
    ("J.R.R. Tolkien", "jrr tolkien", None),
    ("U.S.", "us", None),
    ("a/b", "b", None),
    ("a / b", "b", None),
    ("black-and-white", "black and white", None),
    ("black - white", "black white", None),
    ("12/17/2015", "12 17 2015", None),
    ("x_y", "x y", None),
    ("semi;colon", "semi colon", None),
    ("(yes)", "yes", None),
    ('"quoted"', "quoted", None),
    ("dont", "don't", None),
    ("isnt it", "isn't it", None),
    ("Im here", "im here", None),
    ("'twas twas", "'twas 'twas", None),
    ("somebody'd", "somebodyd", None),
    ("oclock", "o'clock", None),
    ("50%", "50%", None),
    ("rock & roll", "rock & roll", None),
    ("ten", "10", None),
    ("none", "0", None),
    ("Zero", "0", None),
    ("three-four", "3 4", None),
    ("a cat and the dog", "cat and dog", None),
    ("What? Yes!", "what yes", None),
    ("an apple\ta\nday", "apple day", None),
]
EVALAI = [
    (
        "Sesame Street: Animal Zoo (Sesame Street Beginnings)",
        "sesame street: animal zoo sesame street beginnings",
    ),
    ("A Fine, Fine School", "fine fine school"),
    ("1/2 cup", "1 2 cup"),
    ("Cheez-it", "cheez it"),
    ("208-230-360", "208 230 360"),
]


@pytest.mark.parametrize(("answer", "official", "evalai"), NORMALISED)
def test_both_normalisers_give_the_official_outputs(answer, official, evalai):
    assert vqa.normalize_vqa(answer) == official
    assert vqa.normalize_evalai(answer) == (official if evalai is None else evalai)


@pytest.mark.parametrize(("answer", "expected"), EVALAI)
def test_evalai_on_real_answers(answer, expected):
    assert vqa.normalize_evalai(answer) == expected


def test_tables_are_whole():
    assert len(vqa.CONTRACTIONS) == 120 and len(vqa.PUNCTUATION) == 21
    assert vqa.CONTRACTIONS["couldntve"[:7]] == "couldn't"
    assert vqa.CONTRACTIONS["'ow'sat"] == "'ow's'at" and vqa.CONTRACTIONS["Id've"] == "I'd've"


def test_only_the_first_32_periods_go():
    assert vqa.normalize_vqa("x" + "." * 40) == "x" + "." * 8


PIECES = st.sampled_from([*vqa.PUNCTUATION, *"'.: 1a\t\n", "the", "two", "dont", "1,2", "É", "'s"])


@given(st.lists(PIECES, max_size=12).map("".join))
def test_normalisers_follow_the_definition_step_by_step(answer):
    """The definition written down a second time, mark by mark."""

    def punctuation(text, in_number):
        out = text
        for mark in ';/[]"{}()=+\\_-><@`,?!':
            beside = mark + " " in text or " " + mark in text
            gone = beside or re.search(in_number, text) is not None
            out = out.replace(mark, "" if gone else " ")
        return re.sub(r"(?!<=\d)(\.)(?!\d)", "", out, count=32)

    def words(text):
        kept = [vqa.NUMBERS.get(word, word) for word in text.lower().split()]
        return " ".join(vqa.CONTRACTIONS.get(w, w) for w in kept if w not in ("a", "an", "the"))

    flat = answer.replace("\n", " ").replace("\t", " ").strip()
    assert vqa.normalize_vqa(answer) == words(punctuation(flat, r"(\d)(\,)(\d)"))
    flat = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    flat = flat.replace("\n", " ").replace("\t", " ").strip()
    assert vqa.normalize_evalai(answer) == words(punctuation(flat, r"(?<=\d)(\,)+(?=\d)"))


@pytest.mark.parametrize(
    ("answers", "prediction", "expected"),
    [
        (["yes"] * 10, "yes", 100),
        (["yes"] * 10, "Yes", 0),
        (["yes"] * 10, "yes.", 0),
        (["yes"] * 9 + ["no"], "Yes", 100),
        (["yes"] * 9 + ["no"], "no", 30),
        (["2"] * 3 + ["two"] * 2 + ["3"] * 5, "Two", 100),
        (["red"] + ["blue"] * 9, "red", 30),
        (["red"] * 2 + ["blue"] * 8, "red", 60),
        (["red"] * 3 + ["blue"] * 7, "red", 90),
        (["red"] * 4 + ["blue"] * 6, "red", 100),
    ],
)
def test_soft_accuracy_of_the_official_code(answers, prediction, expected):
    assert 100 * vqa.vqa_accuracy(prediction, answers) == pytest.approx(expected)


def test_soft_accuracy_otherwise():
    assert vqa.vqa_accuracy("Yes.", ["yes"] * 10, always_normalize=True) == 1
    assert vqa.evalai_accuracy("", ["red"] * 10) == 0
    assert vqa.soft_accuracy("a", ["a", "a"]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("text", ["No", "no", "No.", "No, there is not", "I do not see"])
def test_pope_reads_no(text):
    assert yesno.parse_pope(text) == "no"


@pytest.mark.parametrize(
    "text",
    ["Yes", "NO", "Not", "no!", "No\n", "Yes. No", "cannot", "isn't", "", "Unknown"],
)
def test_pope_reads_yes(text):
    assert yesno.parse_pope(text) == "yes"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Yes.", "yes")]
    + [(text, "no") for text in ["not sure", "None", "know", "North", "Snow", "Noyes", "Nothing"]]
    + [(text, "other") for text in ["Church", "I yes", "A. Yes", "  yes", ""]],
)
def test_mme_reads_the_first_four_characters(text, expected):
    assert yesno.parse_mme(text) == expected


@pytest.mark.parametrize(
    ("text", "count", "letter", "index"),
    [
        ("B", 2, "B", 1),
        ("D", 2, "D", -1),
        ("B. no", 2, "B", 1),
        ("B.", 2, "FAILED", -1),
        ("B) no", 2, "FAILED", -1),
        ("The answer is A", 2, "FAILED", -1),
        ("The answer is A.", 2, "A", 0),
        ("So. The answer is C. BECAUSE", 3, "C", 2),
        ("The answer is A. The answer is B.", 2, "FAILED", -1),
        ("b", 2, "FAILED", -1),
        (" A", 2, "FAILED", -1),
        ("A ", 2, "FAILED", -1),
        ("A.yes", 2, "FAILED", -1),
        ("", 2, "FAILED", -1),
        ("AB", 2, "FAILED", -1),
        ("E. x", 5, "E", 4),
    ],
)
def test_scienceqa_letters(text, count, letter, index):
    assert choices.parse_scienceqa(text, count) == (letter, index)


OPTIONS = {"A": "teddy bear", "B": "rabbit", "C": "cat", "D": "dog"}


@pytest.mark.parametrize(
    ("text", "now", "then"),
    [(text, "A", "A") for text in ("A", "A.", "(A)")]
    + [
        ("B. rabbit", "B", "B"),
        ("The answer is C", "C", "C"),
        ("C)", "C", "C"),
        ("Option: D", "D", "D"),
        ("It is a rabbit", "B", "B"),
        ("cat", "C", "C"),
        ("D:dog", "D", "D"),
        ("A cat is here", "A", "C"),
        ("**B**", "B", None),
        ("answer:B", "B", None),
        ("E", None, "E"),
    ]
    + [
        (text, None, None)
        for text in ("b", "A and B", "B C", "a dog and a cat", "", "None", "F", "Z rabbit")
        if text != "Z rabbit"
    ],
)
def test_mmbench_matching(text, now, then):
    assert choices.match_mmbench(text, OPTIONS) == now
    assert choices.match_mmbench_2023(text, OPTIONS) == then


def test_mmbench_matching_quirks():
    assert choices.match_mmbench("The answer is a dog", OPTIONS) == "A"
    assert choices.match_mmbench("Z rabbit", OPTIONS) is None
    refusal = "Cannot determine the answer: rabbit"
    assert choices.match_mmbench(refusal, OPTIONS) is None
    assert choices.match_mmbench("x" * 39 + "rabbit", OPTIONS) is None  # longer than the options
    far = "B is what I say and nothing else"
    assert choices.match_mmbench(far, OPTIONS) is None  # too far from the end


@pytest.mark.parametrize(
    ("response", "candidates", "answer", "right"),
    [
        ("B. Low", ["High", "Low", "Medium"], "Low", True),
        ("Low", ["High", "Low", "Medium"], "Low", True),
        ("Low.", ["High", "Low", "Medium"], "Low", False),
        ("Clear", ["Good", "Fair", "Blurry"], "Blurry", True),
        ("Acceptable", ["Annoying", "Acceptable", "Pleasing"], "Annoying", True),
        ("No noise", ["Yes", "No"], "No", True),
        ("", ["Yes", "No"], "No", False),
    ],
)
def test_qbench_with_its_quirks(response, candidates, answer, right):
    assert choices.qbench_right(response, candidates, answer) is right


def test_qbench_strictly():
    candidates = ["Good", "Fair", "Blurry"]
    for response, right in [("C", True), ("Blurry.", True), ("C. Blurry", True), ("Clear", False)]:
        assert choices.qbench_right_strictly(response, candidates, "Blurry") is right


@pytest.mark.parametrize(
    ("reply", "scores"),
    [("8 7", [8, 7]), ("8.5 9", [8.5, 9]), ("8,7", [8, 7]), ("8 7\nBecause", [8, 7])]
    + [
        (reply, [-1, -1])
        for reply in (
            "8, 7",
            "8 7 ",
            "8  7",
            "8\t7",
            "(8 7)",
            "8/10 7/10",
            "\n8 7",
            "Assistant 1: 8",
            "",
        )
    ],
)
def test_llavabench_reviews(reply, scores):
    assert judged.parse_review(reply) == scores


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        (reply, [8, 9])
        for reply in (
            "8 9\nreason",
            "8, 9",
            " 8 9 \nreason",
            "8\t9",
            "8  9",
            "**8** **9**\nreason",
            "8/10 9/10",
            "8/10, 9 / 10.",
            "(8, 9)",
            "8 | 9",
            "8 and 9",
            "\n\n8 9",
            "```\n8 9\n```\nreason",
            "<think>\nThe first has 3 faults: 5 7\n</think>\n8 9\nreason",
            "It begins without the mark, 1 2</think>8 9",
            "Scores: 8 9",
            "Here are the scores:\n\n8 9\nreason",
            "Assistant 1: 8\nAssistant 2: 9\nreason",
            "**Assistant 1:** 8/10, **Assistant 2:** 9/10",
        )
    ]
    + [
        (reply, [-1, -1])
        for reply in (
            "80 90",
            "11 9",
            "8 -9",
            "nan nan",
            "inf inf",
            "8",
            "8/10",
            "8 9 7",
            "8 9 in my opinion",
            "I give 8 and 9",
            "The first of 2 answers is good.\n8 9",
            "Assistant 2: 9\nAssistant 1: 8",
            "Assistant 1: 8",
            "<think>8 9",
            "I'm sorry, but I can't help with that.",
            "",
        )
    ],
)
def test_reviews_are_read_tolerantly_and_within_ten(reply, scores):
    assert judged.read_review(reply) == scores


@pytest.mark.parametrize(
    ("reply", "score"),
    [("0.5", 0.5), ("**0.5**", 0.5), ("Correctness: 0.5", 0.5), ("1.0.", 1.0), (" 0.5", 0.5)]
    + [("0.5\n\nBecause", 0.5), (".5", 0.5), ("<think>1.0</think>\n0.5", 0.5), ("1", 1.0)]
    + [(reply, None) for reply in ("50%", "1/2", "0,5", "5", "1.5", "-0.5", "nan", "<think>1", "")],
)
def test_grades_are_read_tolerantly(reply, score):
    assert judged.read_grade(reply) == score


PARTS = st.sampled_from(
    [*"0123456789 .,/-*`#:()|\n\t", "10", "<think>", "</think>", "Assistant 1", "and", "nan", "1e9"]
)


@given(st.lists(PARTS, max_size=12).map("".join))
def test_whatever_a_judge_says_is_scores_in_range_or_none(reply):
    scores = judged.read_review(reply)
    assert scores == judged.FAILED_REVIEW or all(0 <= score <= 10 for score in scores)
    official = judged.parse_review(reply)
    if official != judged.FAILED_REVIEW:
        assert scores in (official, judged.FAILED_REVIEW)
    grade = judged.read_grade(reply)
    assert grade is None or 0 <= grade <= 1
    if judged.parse_grade(reply) is not None:
        assert grade == judged.parse_grade(reply)


def test_a_long_reply_is_read_at_once():
    assert judged.read_review("8" + " " * 20_000 + "x") == judged.FAILED_REVIEW
    assert judged.read_review("x" * 20_000 + " 1: 8 x") == judged.FAILED_REVIEW


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@given(st.fixed_dictionaries({}, optional={"tuple": JSON, "content": JSON, "official_tuple": JSON}))
def test_a_stored_review_of_another_form_is_refused_in_words(review):
    for reading in judged.READINGS:
        try:
            scores = judged.review_scores(review, reading)
        except ValueError:
            continue
        assert scores is None or all(0 <= score <= 10 for score in scores)


def test_stored_reviews_are_read_as_asked():
    published = {"tuple": [-1, -1], "content": "8, 9\nreason"}
    assert judged.review_scores(published) == [8, 9]
    assert judged.review_scores(published, "official") is None
    assert judged.review_scores({"tuple": [80.0, 90.0], "content": "80 90"}) is None
    assert judged.review_scores({"tuple": [80.0, 90.0], "content": "80 90"}, "official") is None
    assert judged.review_scores({"content": "8 9"}, "official") == [8, 9]


def test_a_run_of_mmvet_without_a_grade_has_no_figure_and_is_in_no_mean():
    items = [
        {"capability": ["ocr"], "scores": [0.5, None]},
        {"capability": ["math"], "scores": [None, None]},
    ]
    figures = judged.mmvet_metrics(items)
    assert (figures["total"], figures["std"], figures["runs"]) == (50.0, 0.0, [50.0, None])
    assert figures["by_capability"] == {"ocr": 50.0, "math": None}
    assert figures["failed"] == 3


def test_llavabench_rounds_where_the_tool_rounds():
    rows = [(8.8, 4.63), (8.8, 4.63), (8.801, 4.6285)]
    items = [{"category": "detail", "reference": ref, "candidate": said} for ref, said in rows] + [
        {"category": "detail", "reference": None, "candidate": None}
    ]
    figures = judged.llavabench_metrics(items)
    # Means 8.80033 and 4.6295 become 8.8 and 4.63 (or 4.629) first.
    first, second = round(26.401 / 3, 3), round(13.8885 / 3, 3)
    assert figures["detail"]["ratio"] == round(100 * second / first, 1)
    assert figures["all"] == figures["detail"] and figures["failed"] == 1
    assert figures["all"]["count"] == 3


def test_mmvet_aggregation_of_the_official_script():
    graded = [
        (["ocr", "math"], [0.5, 0.6]),
        (["rec"], [1.0, 1.0]),
        (["math", "ocr"], [0.0, 0.2]),
        (["rec", "know", "gen"], [0.3, 0.3]),
    ]
    items = [{"capability": names, "scores": scores} for names, scores in graded]
    figures = judged.mmvet_metrics(items)
    assert figures["by_capability"] == {
        "ocr": 32.5,
        "math": 32.5,
        "rec": 65.0,
        "know": 30.0,
        "gen": 30.0,
    }
    assert (figures["total"], figures["std"], figures["runs"]) == (48.8, 3.8, [45.0, 52.5])
    assert figures["by_capability_set"] == {"math_ocr": 32.5, "rec": 100.0, "gen_know_rec": 30.0}
    assert judged.parse_grade("0.5") == 0.5
    assert [judged.parse_grade(reply) for reply in ("", "good", "1.5", "-0.1")] == [None] * 4


def gqa_question(text, answer, structural, kind, group=None, **changes):
    steps = [
        {"operation": "select", "argument": "dog"},
        {"operation": "query", "argument": "color"},
    ]
    return {
        "question": text,
        "answer": answer,
        "isBalanced": True,
        "types": {"structural": structural, "semantic": kind, "detailed": "x"},
        "groups": {"global": group},
        "semantic": steps,
        "entailed": [],
    } | changes


def gqa_set():
    """Six questions with predictions and choices, whose figures the patched eval.py has printed."""
    select, exist = {"operation": "select", "argument": ""}, {"operation": "exist", "argument": "?"}
    name = {"operation": "query", "argument": "name"}
    questions = {
        "1": gqa_question(
            "What color is it?", "red", "query", "attr", "color", entailed=["1", "2"]
        ),
        "2": gqa_question(
            "Is there a dog?", "yes", "verify", "obj", semantic=[select, exist], entailed=["2"]
        ),
        "3": gqa_question("Is it left or right?", "left", "choose", "rel", "place"),
        "4": gqa_question(
            "What color is it?", "blue", "query", "attr", "color", semantic=[select, name]
        )
        | {"entailed": ["3", "5"]},
        "5": gqa_question("Is it?", "no", "logical", "obj", isBalanced=False),
        "6": gqa_question("What color is it?", "color", "compare", "attr"),
    }
    questions["6"]["types"]["detailed"] = "twoCommon"
    predictions = dict(zip("123456", ["red", "no", "left", "green", "no", "color"], strict=True))
    choices_of = {
        number: {"valid": [question["answer"], "green", "no"], "plausible": [question["answer"]]}
        for number, question in questions.items()
    }
    return questions, predictions, choices_of


def test_gqa_figures_of_the_official_script():
    questions, predictions, choices_of = gqa_set()
    figures = gqa.gqa_metrics(gqa.gqa_items(questions, predictions, choices_of))
    expected = {
        "binary": 66.67,
        "open": 50.0,
        "accuracy": 60.0,
        "consistency": 0.0,
        "validity": 100.0,
        "plausibility": 60.0,
    }
    assert {name: round(figures[name], 2) for name in expected} == expected
    assert figures["distribution"] == pytest.approx(0.02 / 3)
    assert figures["by_steps"] == {"2": 100.0, "1": 0.0}
    assert figures["by_words"] == {"4": 50.0, "5": 100.0}
    assert gqa.entailed_ids(questions, predictions) == {"1", "2"}


def test_gqa_without_choices():
    questions, predictions, _ = gqa_set()
    figures = gqa.gqa_metrics(gqa.gqa_items(questions, predictions))
    assert figures["validity"] == figures["plausibility"] == 0
    assert gqa.prediction_of("Red Dog..") == "red dog"


def test_pope_figures():
    pairs = [("yes", "yes")] * 3 + [("no", "yes")] + [("no", "no")] * 4 + [("yes", "no")] * 2
    items = [{"split": "random", "answer": a, "prediction": p} for a, p in pairs]
    items += [{"split": "popular", "answer": "yes", "prediction": "no"}]
    figures = yesno.pope_metrics(items)
    assert figures["random"]["precision"] == 0.75 and figures["random"]["recall"] == 0.6
    assert figures["random"]["f1"] == pytest.approx(2 / 3)
    assert figures["random"]["accuracy"] == 0.7 and figures["random"]["yes_ratio"] == 0.4
    assert figures["popular"]["f1"] == 0  # nothing found: the official script would divide by zero
    assert figures["f1_mean"] == pytest.approx(1 / 3)


def test_mme_figures():
    rows = [("1", "yes", "yes"), ("1", "no", "no"), ("2", "yes", "yes"), ("2", "no", "other")]
    items = [
        {
            "subtask": "color",
            "image": image,
            "answer": answer,
            "prediction": said,
            "score": float(answer == said),
        }
        for image, answer, said in rows
    ]
    figures = yesno.mme_metrics(items)
    assert figures["by_subtask"] == {"color": 125.0}
    assert (figures["perception"], figures["cognition"]) == (125.0, 0)
    assert figures["subtasks"]["color"]["other"] == 1
    assert figures["subtasks"]["color"]["acc_plus"] == 0.5
