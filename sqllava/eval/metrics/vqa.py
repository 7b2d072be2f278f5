"""VQA soft accuracy, with the official VQA normaliser and with EvalAI's (VizWiz, TextVQA).

Definitions: the official VQA evaluation (vqaEval.py) and M4C's EvalAI answer processor, with their
quirks, which the servers have too.
"""

import re
from collections.abc import Sequence

ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

# Written with the apostrophes that the lookup restores: the key is the word without them.
_REGULAR = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
    how'll how's I'm I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've
    o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll
    someone's something'd something'll that's there'd there're there's they'd they'll
    they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll
    who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_IRREGULAR = """
    couldn'tve>couldn't've couldnt've>couldn't've hadnt've>hadn't've hadn'tve>hadn't've
    hed've>he'd've he'dve>he'd've Id've>I'd've I'dve>I'd've itd've>it'd've it'dve>it'd've
    let's>let's mightnt've>mightn't've mightn'tve>mightn't've ow's'at>'ow's'at 'ows'at>'ow's'at
    'ow'sat>'ow's'at shed've>she'd've she'dve>she'd've she's>she's shouldnt've>shouldn't've
    shouldn'tve>shouldn't've
    somebody'd>somebodyd somebodyd've>somebody'd've somebody'dve>somebody'd've
    someoned've>someone'd've someone'dve>someone'd've somethingd've>something'd've
    something'dve>something'd've thered've>there'd've there'dve>there'd've theyd've>they'd've
    they'dve>they'd've wed've>we'd've we'dve>we'd've whod've>who'd've who'dve>who'd've
    wouldnt've>wouldn't've wouldn'tve>wouldn't've yall'll>y'all'll y'allll>y'all'll
    yall'd've>y'all'd've y'alld've>y'all'd've y'all'dve>y'all'd've youd've>you'd've you'dve>you'd've
"""
CONTRACTIONS = {word.replace("'", ""): word for word in _REGULAR.split()} | dict(
    pair.split(">") for pair in _IRREGULAR.split()
)

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The official code passes a flag (32) where `re.sub` takes a count.
_MOST_PERIODS = 32


def normalize_vqa(answer: str) -> str:
    """Normalises an answer as the official VQA evaluation does."""
    return _words(_punctuation(_one_line(answer)))


def normalize_evalai(answer: str) -> str:
    """Normalises an answer as EvalAI's processor does: VizWiz's server and TextVQA's scorer."""
    answer = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _words(_punctuation(_one_line(answer.strip())))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _punctuation(text: str) -> str:
    """Marks beside a space vanish, all do if a number holds a comma; others become spaces."""
    comma_in_number = bool(_COMMA_IN_NUMBER.search(text))
    changed = text
    for mark in PUNCTUATION:
        vanishes = comma_in_number or f"{mark} " in text or f" {mark}" in text
        changed = changed.replace(mark, "" if vanishes else " ")
    return _PERIOD.sub("", changed, count=_MOST_PERIODS)


def _words(text: str) -> str:
    numbered = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in numbered if word not in ARTICLES)


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The share of annotators with whom a prediction agrees, softly; in [0, 1].

    For each annotator: a third for every *other* annotator who gave the prediction, at most 1; then
    the mean. With ten annotators, 1, 2, 3 and 4 agreeing ones give 0.3, 0.6, 0.9 and 1.
    """
    agreeing = sum(answer == prediction for answer in answers)
    each = (min(1.0, (agreeing - (answer == prediction)) / 3) for answer in answers)
    return sum(each) / len(answers)


def vqa_accuracy(prediction: str, answers: Sequence[str], always_normalize: bool = False) -> float:
    """The official VQA accuracy of one prediction.

    The official code normalises only where the annotators do not all agree; elsewhere a prediction
    must be their answer to the letter.

    Args:
        always_normalize: normalise everywhere, as some toolkits do.
    """
    prediction, answers = _one_line(prediction), [_one_line(answer) for answer in answers]
    if always_normalize or len(set(answers)) > 1:
        prediction, answers = normalize_vqa(prediction), [normalize_vqa(a) for a in answers]
    return soft_accuracy(prediction, answers)


def evalai_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """EvalAI's accuracy of one prediction: normalised on both sides, always."""
    return soft_accuracy(normalize_evalai(prediction), [normalize_evalai(a) for a in answers])
