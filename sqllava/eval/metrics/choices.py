"""Multiple choice: how ScienceQA, MMBench and Q-Bench find the chosen option in an answer.

Each benchmark has a rule of its own, and scores are comparable only under it.
"""

import re
from collections.abc import Mapping, Sequence

FAILED = "FAILED"
SCIENCEQA_LETTERS = "ABCDE"
_SCIENCEQA_SENTENCE = re.compile(r"The answer is ([A-Z]).")

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_NO_ANSWER = "Failed to obtain answer via API"
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)
_LAST_WORDS = 5
# What may stand around a letter in the rule of 2023, in the order of trial.
_AFFIXES = (
    *(("", after) for after in (".", ",", ":", ")", ").")),
    *(("(", after) for after in (")", ").")),
    *((":", after) for after in ("", ",", ".", ")", ").")),
)
_OLD_LETTERS = "ABCDE"


def parse_scienceqa(text: str, choices: int) -> tuple[str, int]:
    """The letter in an answer, or FAILED, and its index.

    The index is -1 for FAILED and for a letter beyond the choices. As LLaVA's scorer: the bare
    letter, or the letter with ". " after it at the start, or the one sentence "The answer is X."
    (any character may stand for the full stop).
    """
    if text in SCIENCEQA_LETTERS and len(text) == 1:
        letter = text
    elif len(text) >= 3 and text[0] in SCIENCEQA_LETTERS and text[1:3] == ". ":
        letter = text[0]
    else:
        found = _SCIENCEQA_SENTENCE.findall(text)
        letter = found[0] if len(found) == 1 else FAILED
    offered = SCIENCEQA_LETTERS[:choices]
    return letter, offered.index(letter) if letter in offered else -1


def match_mmbench(text: str, options: Mapping[str, str]) -> str | None:
    """The option that an answer means, by VLMEvalKit's rule without a judge; None if it is unclear.

    Args:
        options: texts by letter.
    """
    if _NO_ANSWER not in text:
        if any(refusal in text for refusal in _REFUSALS):
            return None
        words = text.translate(_MARKS).split()
        present = [letter for letter in options if letter in words]
        if len(present) == 1 and words.index(present[0]) > len(words) - _LAST_WORDS:
            return present[0]
        if not present and "Z" in words:
            return None
        said = _ANSWER_IS.search(text)
        if said and said.group(1).upper() in options:
            return said.group(1).upper()
    if len(text.lower()) > 2 * sum(len(option) for option in options.values()):
        return None
    return _only_contained(text, options)


def match_mmbench_2023(text: str, options: Mapping[str, str]) -> str | None:
    """The option that an answer means, by MMBench's rule of 2023, which lmms-eval keeps.

    An E counts even where there is no such option, as there.
    """
    words = text.split()
    present = [letter for letter in _OLD_LETTERS if letter in words]
    # An A in a longer text may be an article.
    if len(present) == 1 and not ("A" in words and len(words) > 3):
        return present[0]
    for before, after in _AFFIXES:
        present = [letter for letter in _OLD_LETTERS if before + letter + after in words]
        if len(present) == 1:
            return present[0]
    return _only_contained(text, options)


def _only_contained(text: str, options: Mapping[str, str]) -> str | None:
    contained = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return contained[0] if len(contained) == 1 else None


def qbench_right(response: str, candidates: Sequence[str], answer: str) -> bool:
    """Q-Bench's official check: by first letter, first word or the whole response.

    An answer that merely begins with A to D is read as that letter, as there; nothing is wrong.
    """
    if not response:
        return False
    index = ord(response[0]) - ord("A")
    by_letter = 0 <= index < len(candidates) and candidates[index] == answer
    return by_letter or response.split(" ")[0] == answer or response == answer


def qbench_right_strictly(response: str, candidates: Sequence[str], answer: str) -> bool:
    """Whether a response is the right letter or the right text, and nothing else."""
    said = response.strip().rstrip(".")
    letter = chr(ord("A") + list(candidates).index(answer))
    return said in (letter, answer, f"{letter}. {answer}".rstrip("."))
