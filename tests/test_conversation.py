"""Records, turns, the self-questioning draw, and the exact text that each template makes."""

import random
from typing import Any

import pytest

from sqllava.conversation import (
    IMAGE,
    TEMPLATES,
    Piece,
    Turn,
    choose_self_questions,
    get_template,
    render,
    render_exchanges,
    turns_from_record,
)

V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
SQ_SYSTEM = V1_SYSTEM + (
    "Also, the artificial intelligence assistant is a curious virtual user. The virtual user asks "
    "complex questions that are relevant to the content in the image, for example, asking about "
    "background knowledge of the objects in the image, asking to discuss about events happening in "
    "the image, etc. Again, do not ask about uncertain details."
)
TURNS = [
    Turn("user", "What is it?", images=1),
    Turn("assistant", "A car."),
    Turn("user", "What colour?"),
    Turn("assistant", "Red."),
]
ASKED = [*TURNS[:2], Turn("vuser", "What colour?"), TURNS[3]]


def text(pieces: list[Piece]) -> str:
    marks = {"image": IMAGE, "eos": "</s>"}
    return "".join(marks.get(piece.kind, piece.text) for piece in pieces)


def record(*values: str, **fields: Any) -> dict[str, Any]:
    speakers = ["human", "gpt"] * len(values)
    conversations = [
        {"from": who, "value": value} for who, value in zip(speakers, values, strict=False)
    ]
    return {"id": "1", "conversations": conversations, **fields}


def test_v1_text() -> None:
    assert text(render(TURNS, TEMPLATES["v1"])) == (
        V1_SYSTEM + " USER: <image>\nWhat is it? ASSISTANT: A car.</s>"
        "USER: What colour? ASSISTANT: Red.</s>"
    )


def test_v1_sq_text() -> None:
    assert text(render(ASKED, TEMPLATES["v1_sq"])) == (
        SQ_SYSTEM + " USER: <image>\nWhat is it? ASSISTANT: A car.</s>"
        "VUSER: What colour?</s> ASSISTANT: Red.</s>"
    )


def test_plain_text_is_the_caption_alone() -> None:
    pieces = render(
        [Turn("user", "Describe it.", 1), Turn("assistant", "a car")], TEMPLATES["plain"]
    )
    assert pieces == [Piece("image"), Piece("text", "a car\n", trained=True)]


@pytest.mark.parametrize(
    ("turns", "end"),
    [
        ([Turn("user", "Why?", 1), Turn("assistant", None)], " USER: <image>\nWhy? ASSISTANT:"),
        ([*TURNS[:2], Turn("vuser", None)], " ASSISTANT: A car.</s>VUSER:"),
        ([Turn("user", "", 1), Turn("assistant", None)], " USER: <image> ASSISTANT:"),
        ([Turn("user", "Two", 2), Turn("assistant", None)], ": <image>\n<image>\nTwo ASSISTANT:"),
    ],
)
def test_a_prompt_ends_in_the_open_role_tag(turns: list[Turn], end: str) -> None:
    assert text(render(turns, TEMPLATES["v1_sq"])).endswith(end)


def test_answers_and_virtual_questions_are_trained_and_nothing_else() -> None:
    trained = [piece for piece in render(ASKED, TEMPLATES["v1_sq"]) if piece.trained]
    assert text(trained) == " A car.</s> What colour?</s> Red.</s>"


def test_exchanges_join_to_the_whole() -> None:
    exchanges = render_exchanges(ASKED, TEMPLATES["v1_sq"])
    assert len(exchanges) == 2
    assert text(exchanges[1]) == "VUSER: What colour?</s> ASSISTANT: Red.</s>"


def test_unknown_template_names_the_known() -> None:
    with pytest.raises(
        ValueError, match=r"template 'v2'; choose from \['plain', 'v1', 'llava_v1', 'v1_sq'\]"
    ):
        get_template("v2")


def test_v1_has_no_virtual_user() -> None:
    with pytest.raises(ValueError, match="'v1' has no role 'vuser'"):
        render(ASKED, TEMPLATES["v1"])


@pytest.mark.parametrize("turns", [TURNS, [Turn("user", "q"), Turn("assistant", "a")]])
def test_plain_takes_one_image_and_one_caption(turns: list[Turn]) -> None:
    with pytest.raises(ValueError, match="one image and one caption"):
        render(turns, TEMPLATES["plain"])


@pytest.mark.parametrize(
    ("value", "turn"),
    [
        ("<image>\nWhat?", Turn("user", "What?", 1)),
        ("What?\n<image>", Turn("user", "What?", 1)),
        ("How many?\n<image>\nOne word.", Turn("user", "How many?\n\nOne word.", 1)),
        ("<image><image> Both?", Turn("user", "Both?", 2)),
        ("  no image, kept as it is ", Turn("user", "  no image, kept as it is ", 0)),
    ],
)
def test_image_moves_to_the_front(value: str, turn: Turn) -> None:
    assert turns_from_record(record(value, "a"))[0] == turn


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({}, "'conversations' must be a list"),
        ({"conversations": "hello"}, "'conversations' must be a list"),
        ({"conversations": []}, "found 0 turns"),
        (record("q", "a", "q"), "found 3 turns"),
        ({"conversations": ["q", "a"]}, "turn 0 must be a dict"),
        (
            {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "q"}]},
            "turn 0 must come from 'human', found 'assistant'",
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "human", "value": "q"}]},
            "turn 1 must come from 'gpt', found 'user'",
        ),
        ({"conversations": [{"from": "system", "value": "q"}, {}]}, "turn 0: 'from' must be"),
        ({"conversations": [{"from": "human", "value": 3}, {}]}, "turn 0: 'value' must be text"),
        ({"conversations": [{"from": "human"}, {}]}, "turn 0: 'value' must be text"),
        (record("q", "see <image>"), "turn 1: <image> may stand only in a human turn"),
    ],
)
def test_malformed_records_are_errors(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        turns_from_record(bad)


def many(exchanges: int, images: int = 1) -> list[Turn]:
    turns = [
        turn for n in range(exchanges) for turn in (Turn("user", f"q{n}"), Turn("assistant", "a"))
    ]
    return [Turn("user", "q", images), *turns[1:]]


def test_ratio_zero_and_one_draw_nothing() -> None:
    turns = many(4)
    assert choose_self_questions(turns, 0.0, None) == turns
    roles = [turn.role for turn in choose_self_questions(turns, 1.0, None)]
    assert roles == ["user", "assistant"] + ["vuser", "assistant"] * 3


def test_the_draw_belongs_to_its_generator() -> None:
    turns = many(2001)
    draws = [choose_self_questions(turns, 0.3, random.Random("7-0-3")) for _ in range(2)]
    assert draws[0] == draws[1]
    assert draws[0] != choose_self_questions(turns, 0.3, random.Random("7-1-3"))
    assert draws[0][0].role == "user"
    share = sum(turn.role == "vuser" for turn in draws[0]) / 2000
    assert 0.26 < share < 0.34


def test_the_draw_leaves_the_turns_it_was_given() -> None:
    turns = many(3)
    choose_self_questions(turns, 1.0, None)
    assert turns == many(3)


def test_text_only_has_no_virtual_user() -> None:
    assert choose_self_questions(many(3, images=0), 1.0, None) == many(3, images=0)


def test_a_turn_that_brings_an_image_stays_the_users() -> None:
    turns = [*many(1), Turn("user", "and this?", 1), Turn("assistant", "a")]
    assert choose_self_questions(turns, 1.0, None)[2].role == "user"


@pytest.mark.parametrize(("ratio", "rng"), [(-0.1, None), (1.5, None), (0.5, None)])
def test_a_wrong_ratio_or_no_generator_is_an_error(ratio: float, rng: None) -> None:
    with pytest.raises(ValueError, match="ratio"):
        choose_self_questions(many(2), ratio, rng)
