"""Ids and labels: the published rows, truncation, and random conversations without a mask error."""

import json
import random
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sqllava.conversation import IMAGE, TEMPLATES, Turn
from sqllava.encoding import (
    IGNORE_INDEX,
    Encoded,
    NothingTrainedError,
    TooLongError,
    add_image_token,
    encode_prompt,
    encode_record,
    encode_text,
    encode_turns,
    image_token_id,
)

LLAMA2 = REPO.parent / "shared" / "golden" / "llama2-tokenization"
PUBLISHED_IMAGE_ID = -200
SQ = TEMPLATES["v1_sq"]
GOLDEN_ROWS, GOLDEN_PROMPTS = 23, 2


# --- the published code's ids and labels ----------------------------------------------------------


@pytest.fixture(scope="session", params=["upstream-tiny", "llama2-tokenization"])
def published(request: pytest.FixtureRequest, golden: Path) -> tuple[Any, Any, Any]:
    """(tokenizer, golden.json, records by id) of one of the two published sets."""
    folder, vocabulary = golden, golden / "vicuna-tiny"
    if request.param == "llama2-tokenization":
        if not LLAMA2.is_dir():
            pytest.skip("the Llama-2 vocabulary is not here (shared/golden/llama2-tokenization)")
        folder = vocabulary = LLAMA2
    tokenizer = AutoTokenizer.from_pretrained(vocabulary, trust_remote_code=False)
    add_image_token(tokenizer)
    records = json.loads((folder / "conversations.json").read_text())
    numbers = json.loads((folder / "golden.json").read_text())
    return tokenizer, numbers, {record["id"]: record for record in records}


def placed(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Published ids with the image's mark replaced by the placeholder's id."""
    return [image_token_id(tokenizer) if i == PUBLISHED_IMAGE_ID else i for i in ids]


@pytest.mark.parametrize("number", range(GOLDEN_ROWS))
def test_ids_and_labels_are_the_published(published: tuple, number: int) -> None:
    tokenizer, numbers, records = published
    assert len(numbers["label_rows"]) == GOLDEN_ROWS
    row = numbers["label_rows"][number]
    encoded = encode_record(records[row["id"]], row["version"], tokenizer, sq_r=row["sq_r"])
    assert encoded.input_ids == placed(row["input_ids"], tokenizer)
    assert encoded.labels == row["labels"]


@pytest.mark.parametrize("number", range(GOLDEN_PROMPTS))
def test_prompts_are_the_published(published: tuple, number: int) -> None:
    tokenizer, numbers, _ = published
    assert len(numbers["prompts"]) == GOLDEN_PROMPTS
    row = numbers["prompts"][number]
    expected = placed(row["input_ids"], tokenizer)
    turns = [Turn("user", row["question"], images=1), Turn("assistant", None)]
    assert encode_prompt(turns, "v1_sq", tokenizer) == expected
    assert encode_text(row["prompt"], tokenizer) == expected


def test_text_with_end_tokens_equals_the_turns_behind_it(tokenizer: Any) -> None:
    turns = [Turn("user", "Why?", 1), Turn("assistant", "So."), Turn("vuser", None)]
    prompt = SQ.system + " USER: <image>\nWhy? ASSISTANT: So.</s>VUSER:"
    assert encode_text(prompt, tokenizer, 4) == encode_prompt(turns, SQ, tokenizer, 4)


def test_a_prompt_must_be_open(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="must be open"):
        encode_prompt([Turn("user", "q")], SQ, tokenizer)
    with pytest.raises(ValueError, match="'.ud83d' is half a surrogate pair, and no text"):
        encode_prompt([Turn("user", "q \ud83d"), Turn("assistant", None)], SQ, tokenizer)


def test_a_tokenizer_without_the_image_token_is_an_error(golden: Path) -> None:
    bare = AutoTokenizer.from_pretrained(golden / "vicuna-tiny", trust_remote_code=False)
    with pytest.raises(ValueError, match="call add_image_token first"):
        encode_prompt([Turn("user", "q", 1), Turn("assistant", None)], SQ, bare)
    add_image_token(bare)
    size = len(bare)
    add_image_token(bare)
    assert len(bare) == size


# --- too long, and nothing to learn ---------------------------------------------------------------


TURNS = [
    Turn("user", "What is in the picture?", 1),
    Turn("assistant", "A red car."),
    Turn("vuser", "What colour is the road?"),
    Turn("assistant", "Grey."),
    Turn("user", "Is it day?"),
    Turn("assistant", "Yes, it is."),
]


def test_whole_exchanges_are_dropped_from_the_end(tokenizer: Any) -> None:
    whole, two, one = (encode_turns(TURNS[:n], SQ, tokenizer, 9) for n in (6, 4, 2))
    lengths = [len(encoded.input_ids) for encoded in (whole, two, one)]

    for limit, expected, dropped in [
        (lengths[0], whole, 0),
        (lengths[0] - 1, two, 2),
        (lengths[1], two, 2),
        (lengths[1] - 1, one, 4),
        (lengths[2], one, 4),
    ]:
        encoded = encode_turns(TURNS, SQ, tokenizer, 9, max_length=limit)
        assert encoded.input_ids == expected.input_ids
        assert encoded.labels == expected.labels
        assert encoded.dropped_turns == dropped


def test_a_first_answer_too_long_is_cut_and_counted(tokenizer: Any) -> None:
    one = encode_turns(TURNS[:2], SQ, tokenizer, 9)
    limit = len(one.input_ids) - 2
    encoded = encode_turns(TURNS, SQ, tokenizer, 9, max_length=limit)
    assert encoded.input_ids == one.input_ids[:limit]
    assert encoded.labels == one.labels[:limit]
    assert encoded.input_ids.count(image_token_id(tokenizer)) == 9
    assert encoded.dropped_turns == 6
    assert encoded.supervised > 0


def test_no_room_for_a_target_is_an_error(tokenizer: Any) -> None:
    one = encode_turns(TURNS[:2], SQ, tokenizer, 9)
    first = next(i for i, label in enumerate(one.labels) if label != IGNORE_INDEX)
    assert encode_turns(TURNS, SQ, tokenizer, 9, max_length=first + 1).supervised == 1
    with pytest.raises(TooLongError, match=f"begins at token {first}, beyond .* of {first}$"):
        encode_turns(TURNS, SQ, tokenizer, 9, max_length=first)


def test_nothing_to_learn_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(NothingTrainedError):
        encode_turns([Turn("user", "What?")], SQ, tokenizer)


# --- other tokenizers -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def byte_level() -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer (GPT-2, Llama 3), trained here on a few sentences."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([SQ.system, "USER: what? ASSISTANT: that. VUSER: why?"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>"
    )
    add_image_token(tokenizer)
    return tokenizer


def test_a_byte_level_tokenizer_gives_the_same_targets(byte_level: Any) -> None:
    encoded = encode_turns(TURNS, SQ, byte_level, 9)
    assert targets(encoded, byte_level) == spoken(TURNS, byte_level)
    system = SQ.system + " USER: " + IMAGE * 9 + "\nWhat is in the picture? ASSISTANT: A red car."
    assert byte_level.decode(encoded.input_ids).startswith("<|begin|>" + system + "<|end|>")


def test_a_tokenizer_without_a_start_token_gets_none(byte_level: Any) -> None:
    with_start = encode_turns(TURNS, SQ, byte_level)
    byte_level.bos_token = None
    try:
        assert encode_turns(TURNS, SQ, byte_level).input_ids == with_start.input_ids[1:]
    finally:
        byte_level.bos_token = "<|begin|>"


# --- random conversations -------------------------------------------------------------------------

# What a mask found by searching the prompt would stumble over.
TRAPS = [
    *("</s>", "<s>", "<unk>", "<|end|>", "<image>", "<0x41>", "USER:", " ASSISTANT: ", "VUSER:"),
    *("ASSISTANT", "</s>USER: ", "\n", " ", "  ", "\t", "é", "▁", "\u3000", "🙂", "日本語", "\x00"),
]
# Every character but the lone surrogates, which are not text.
texts = st.lists(st.one_of(st.sampled_from(TRAPS), st.text(max_size=6)), max_size=3).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> list[Turn]:
    """One to twelve exchanges, the first with none, one or two images, some asked by the model."""
    # Short ones more often: they are faster, and as many traps are in them.
    images = draw(st.sampled_from([0, 1, 1, 1, 2]))
    turns: list[Turn] = []
    for number in range(draw(st.sampled_from([1, 2, 3] * 4 + list(range(1, 13))))):
        asks = number > 0 and images > 0 and draw(st.booleans())
        turns.append(Turn("vuser" if asks else "user", draw(texts), images if number == 0 else 0))
        turns.append(Turn("assistant", draw(texts)))
    return turns


def as_read(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """sentencepiece writes a space as "▁" and cannot tell the two apart: both read as a space."""
    return text.replace("▁", " ") if is_sentencepiece(tokenizer) else text


@lru_cache
def is_sentencepiece(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "▁" in tokenizer.get_vocab()


def decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Ids -> text, byte for byte: nothing cleaned, stripped or replaced."""
    if not is_sentencepiece(tokenizer):
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    raw = bytearray()
    for piece in tokenizer.convert_ids_to_tokens(ids):
        byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
        raw += bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()
    return raw.decode()


def targets(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts between the trained end tokens; each must end in one."""
    found: list[list[int]] = [[]]
    for label in encoded.labels:
        if label == tokenizer.eos_token_id:
            found.append([])
        elif label != IGNORE_INDEX:
            found[-1].append(label)
    assert found.pop() == []
    return [decode(ids, tokenizer) for ids in found]


def spoken(turns: list[Turn], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the model is meant to say: each with the space after its tag, if it says anything."""
    texts = [turn.text or "" for turn in turns if turn.role != "user"]
    return [as_read(" " + text if text else "", tokenizer) for text in texts]


def masked(ids: list[int], labels: list[int]) -> list[int]:
    """What the labels must be, by where they are trained."""
    pairs = zip(ids, labels, strict=True)
    return [IGNORE_INDEX if label == IGNORE_INDEX else i for i, label in pairs]


def check(turns: list[Turn], tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode_turns(turns, SQ, tokenizer, image_tokens=3)
    ids, labels = encoded.input_ids, encoded.labels

    assert targets(encoded, tokenizer) == spoken(turns, tokenizer)
    assert labels == masked(ids, labels)
    assert ids.count(image_token_id(tokenizer)) == 3 * turns[0].images
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.eos_token_id) == sum(turn.role != "user" for turn in turns)

    kept = random.Random(len(ids)).randrange(0, len(turns), 2)
    if kept:
        assert ids[: len(part := encode_turns(turns[:kept], SQ, tokenizer, 3).input_ids)] == part
    # Where a prompt ends, the trained text begins: the same ids lead up to it.
    for opened in {kept, kept + 1}:
        if turns[opened].role != "user":
            prompt = [*turns[:opened], Turn(turns[opened].role, None)]
            lead = encode_prompt(prompt, SQ, tokenizer, 3)
            assert ids[: len(lead)] == lead


def check_record(turns: list[Turn], sq_r: float, seed: int, tokenizer: Any) -> None:
    """The same through a LLaVA record, where `<image>` is a mark and not a text."""
    record = {"conversations": [], "image": "0.png"}
    for turn in turns:
        text, speaker = turn.text or "", "gpt" if turn.role == "assistant" else "human"
        if speaker == "gpt":
            text = text.replace(IMAGE, "")
        record["conversations"].append({"from": speaker, "value": text + IMAGE * turn.images})
    encoded = encode_record(record, "v1_sq", tokenizer, sq_r, random.Random(seed), 3)

    values = [entry["value"] for entry in record["conversations"]]
    marks = sum(value.count(IMAGE) for value in values[::2])
    assert encoded.input_ids.count(image_token_id(tokenizer)) == 3 * marks
    said = targets(encoded, tokenizer)
    answers = [as_read(" " + value if value else "", tokenizer) for value in values[1::2]]
    if sq_r == 0 or not marks:
        assert said == answers
    else:
        may_ask = [number > 0 and IMAGE not in value for number, value in enumerate(values[::2])]
        assert len(answers) <= len(said) <= len(answers) + sum(may_ask)
        if sq_r == 1:
            assert len(said) == len(answers) + sum(may_ask)
    assert encoded.labels == masked(encoded.input_ids, encoded.labels)


anything = given(
    turns=conversations(),
    sq_r=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 9),
)
relaxed = settings(deadline=None, suppress_health_check=list(HealthCheck))


@anything
@settings(relaxed, max_examples=300)
def test_random_conversations(tokenizer: Any, turns: list[Turn], sq_r: float, seed: int) -> None:
    check(turns, tokenizer)
    check_record(turns, sq_r, seed, tokenizer)


@anything
@settings(relaxed, max_examples=100)
def test_random_conversations_byte_level(
    byte_level: Any, turns: list[Turn], sq_r: float, seed: int
) -> None:
    check(turns, byte_level)
    check_record(turns, sq_r, seed, byte_level)


@pytest.mark.slow
@anything
@settings(relaxed, max_examples=10_000)
def test_ten_thousand_random_conversations(
    tokenizer: Any, turns: list[Turn], sq_r: float, seed: int
) -> None:
    check(turns, tokenizer)
    check_record(turns, sq_r, seed, tokenizer)


@anything
@settings(relaxed, max_examples=100)
def test_random_captions(tokenizer: Any, turns: list[Turn], sq_r: float, seed: int) -> None:
    """Stage 1: the caption and its newline, after the space that sentencepiece puts in front."""
    caption = turns[-1].text or ""
    pair = [Turn("user", turns[0].text, 1), Turn("assistant", caption)]
    encoded = encode_turns(pair, TEMPLATES["plain"], tokenizer, 3)
    trained = [label for label in encoded.labels if label != IGNORE_INDEX]
    assert decode(trained, tokenizer) == as_read(" " + caption + "\n", tokenizer)
    assert encoded.labels[:4] == [IGNORE_INDEX] * 4
    assert len(encoded.labels) == 4 + len(trained)
