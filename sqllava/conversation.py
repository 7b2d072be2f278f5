"""Conversations as data: turns, the templates that render them, and the self-questioning draw.

First step of a record's way to the loss: record -> turns -> pieces of text with a `trained` mark.
Nothing here knows of tokenizers; `encoding.py` turns the pieces into ids and labels.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Role = Literal["user", "assistant", "vuser"]
IMAGE = "<image>"

_ROLE_OF_SPEAKER: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "vuser": "vuser",
}

_ASSISTANT_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_HUMAN_SYSTEM = _ASSISTANT_SYSTEM.replace("user", "human")
# Released weights were trained with this text joined on without a space.
_VIRTUAL_USER_SYSTEM = (
    "Also, the artificial intelligence assistant is a curious virtual user. "
    "The virtual user asks complex questions that are relevant to the content in the image, "
    "for example, asking about background knowledge of the objects in the image, "
    "asking to discuss about events happening in the image, etc. "
    "Again, do not ask about uncertain details."
)

DESCRIBE_QUESTION = "Can you describe the image in detail?"


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        role: who speaks; "vuser" is the model asking as the virtual user.
        text: what is said, without `<image>` marks; None leaves the turn open, for the model to
            complete (only in the last turn of a prompt).
        images: how many images stand at the front of the turn.
    """

    role: Role
    text: str | None
    images: int = 0


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered conversation: text, an image, or the end-of-sentence token."""

    kind: Literal["text", "image", "eos"]
    text: str = ""
    trained: bool = False


@dataclass(frozen=True)
class Template:
    """How turns become text. The published templates differ only in these fields.

    Attributes:
        system: text before the first turn.
        tags: what announces each role, such as "USER"; a role without a tag cannot be used.
        self_questions: whether human turns may become VUSER turns.
        caption_only: stage 1's form: `<image>` + caption + newline, nothing else.
    """

    name: str
    system: str = ""
    tags: Mapping[Role, str] | None = None
    self_questions: bool = False
    caption_only: bool = False


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template("plain", caption_only=True),
        Template("v1", _ASSISTANT_SYSTEM, {"user": "USER", "assistant": "ASSISTANT"}),
        # Q-Bench's published runner asks in this one.
        Template("llava_v1", _HUMAN_SYSTEM, {"user": "USER", "assistant": "ASSISTANT"}),
        Template(
            "v1_sq",
            _ASSISTANT_SYSTEM + _VIRTUAL_USER_SYSTEM,
            {"user": "USER", "assistant": "ASSISTANT", "vuser": "VUSER"},
            self_questions=True,
        ),
    )
}


def get_template(name: str) -> Template:
    """Looks a template up by its name; raises ValueError naming the known ones."""
    if name not in TEMPLATES:
        raise ValueError(f"unknown conversation template {name!r}; choose from {list(TEMPLATES)}")
    return TEMPLATES[name]


def turns_from_record(record: Mapping[str, Any]) -> list[Turn]:
    """Reads the turns of a LLaVA record.

    `<image>` is moved to the front of its turn, and the text of such a turn is stripped, as
    published.

    Args:
        record: a dict with `conversations`: a list of {"from": "human" | "gpt", "value": text}.

    Raises:
        ValueError: the turns are missing, not text, out of order (human and gpt must alternate,
            human first), or hold an image mark in an answer.
    """
    conversations = record.get("conversations")
    if not isinstance(conversations, Sequence) or isinstance(conversations, str):
        raise ValueError(f"'conversations' must be a list of turns, found {conversations!r:.80}")
    turns = [_turn(number, entry) for number, entry in enumerate(conversations)]
    if not turns or len(turns) % 2:
        raise ValueError(f"expected pairs of human and gpt turns, found {len(turns)} turns")
    for number, turn in enumerate(turns):
        asked = turn.role in ("user", "vuser")
        if asked != (number % 2 == 0):
            expected = "human" if number % 2 == 0 else "gpt"
            raise ValueError(f"turn {number} must come from {expected!r}, found {turn.role!r}")
        if turn.images and turn.role != "user":
            raise ValueError(f"turn {number}: {IMAGE} may stand only in a human turn")
    return turns


def _turn(number: int, entry: Any) -> Turn:
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"turn {number} must be a dict with 'from' and 'value', found {entry!r:.80}"
        )
    speaker, text = entry.get("from"), entry.get("value")
    if not isinstance(speaker, str) or speaker not in _ROLE_OF_SPEAKER:
        raise ValueError(f"turn {number}: 'from' must be 'human' or 'gpt', found {speaker!r}")
    if not isinstance(text, str):
        raise ValueError(f"turn {number}: 'value' must be text, found {text!r:.80}")
    images = text.count(IMAGE)
    if images:
        text = text.replace(IMAGE, "").strip()
    return Turn(_ROLE_OF_SPEAKER[speaker], text, images)


def choose_self_questions(
    turns: Sequence[Turn], ratio: float, rng: random.Random | None
) -> list[Turn]:
    """Turns human turns after the first into VUSER turns, each with probability `ratio`.

    As published, only conversations with an image take part, and the first turn stays the user's.
    A later turn that brings an image of its own stays too: an image cannot be asked for.

    Args:
        rng: a generator of the caller's, so that the draw has an address; may be None when the
            ratio is 0 or 1, where nothing is drawn.
    """
    check_share(ratio)
    if 0.0 < ratio < 1.0 and rng is None:
        raise ValueError("a self-questioning ratio between 0 and 1 needs a random generator")
    if ratio == 0.0 or not any(turn.images for turn in turns):
        return list(turns)

    def drawn() -> bool:
        return rng is None or rng.random() < ratio

    return [
        replace(turn, role="vuser")
        if number > 0 and turn.role == "user" and not turn.images and drawn()
        else turn
        for number, turn in enumerate(turns)
    ]


def check_share(ratio: float) -> None:
    """Raises ValueError if it cannot be a share of self-questions."""
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"the self-questioning ratio must be in [0, 1], found {ratio}")


def render(turns: Sequence[Turn], template: Template) -> list[Piece]:
    """Renders turns into pieces whose concatenated text is the published prompt string.

    Answers with their end token are trained, and so are VUSER questions with theirs; role tags,
    the system text and the user's questions never are.
    """
    return [piece for exchange in render_exchanges(turns, template) for piece in exchange]


def render_exchanges(turns: Sequence[Turn], template: Template) -> list[list[Piece]]:
    """Renders turns exchange by exchange (a question and its answer); the first holds the system
    text. Truncation drops whole exchanges from the end of this list."""
    if template.caption_only:
        return [_render_caption(turns)]
    rendered: list[list[Piece]] = []
    for number, turn in enumerate(turns):
        if turn.role != "assistant" or not rendered:
            # The space that parts the system text from the first tag.
            rendered.append([] if number else [Piece("text", template.system + " ")])
        rendered[-1] += _render_turn(turn, template)
    return rendered


def form(template: Template) -> list[tuple[str, str]] | None:
    """How a template writes turns, whatever its system text; None if it takes no questions.

    A model may be asked in any template of the same form as the one that it was trained in.
    """
    if template.caption_only or not {"user", "assistant"} <= set(template.tags or ()):
        return None
    talk = [Turn("user", "a", images=1), Turn("assistant", "b"), Turn("user", "c")]
    pieces = render([*talk, Turn("assistant", None)], replace(template, system=""))
    return [(piece.kind, piece.text) for piece in pieces]


def _render_caption(turns: Sequence[Turn]) -> list[Piece]:
    if len(turns) != 2 or turns[0].images != 1 or turns[1].text is None:
        raise ValueError(
            "the 'plain' template takes one image and one caption (two turns), "
            f"found {len(turns)} turns with {sum(turn.images for turn in turns)} images"
        )
    return [Piece("image"), Piece("text", turns[1].text + "\n", trained=True)]


def _render_turn(turn: Turn, template: Template) -> list[Piece]:
    tags = template.tags or {}
    if turn.role not in tags:
        raise ValueError(f"template {template.name!r} has no role {turn.role!r}: {list(tags)}")
    tag = Piece("text", f"{tags[turn.role]}:")
    if turn.text is None:
        return [tag]
    trained = turn.role != "user"
    pieces = [tag]
    if turn.images:
        # "USER: <image>\n<image>\ntext"; an image without text brings no newline after it.
        pieces.append(Piece("text", " "))
        for number in range(turn.images):
            pieces += [Piece("text", "\n")] * (number > 0) + [Piece("image")]
        pieces += [Piece("text", "\n" + turn.text)] * bool(turn.text)
    elif turn.text:
        pieces.append(Piece("text", " " + turn.text, trained))
    if turn.role != "user":
        pieces.append(Piece("eos", trained=trained))
    if turn.role != "assistant":
        pieces.append(Piece("text", " "))
    return pieces


def question_key(text: str) -> str:
    """What makes two questions the same: their words, whatever the case, blanks and last mark.

    The key of a text without words is "", which every conversation counts as asked.
    """
    return " ".join(text.casefold().split()).rstrip("?.! ")
