"""The processor's arguments, those of transformers' processors: each works, or is refused."""

import base64
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from golden_numbers import GOLDEN, image
from transformers import AutoTokenizer
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from sqllava.model.processor import SQLlavaProcessor

SHORT, LONG = "USER: <image>\nWho? ASSISTANT:", "USER: <image>\nWho is it, then? ASSISTANT:"


@pytest.fixture(scope="module")
def processor():
    size = {"height": 56, "width": 56}
    images = LlavaImageProcessorPil(size={"shortest_edge": 56}, crop_size=size, do_pad=True)
    return SQLlavaProcessor(images, AutoTokenizer.from_pretrained(GOLDEN / "vicuna-tiny"), 14)


@pytest.fixture
def both(processor):
    """Prepares two prompts with an image each."""
    return partial(processor, text=[SHORT, LONG], images=[image("0.png"), image("1.png")])


def chat(picture, *texts):
    """Messages of a user and an assistant in turn, the first with a picture."""
    roles = ("user", "assistant")
    messages = [
        {"role": roles[number % 2], "content": [{"type": "text", "text": text}]}
        for number, text in enumerate(texts)
    ]
    messages[0]["content"].insert(0, picture)
    return messages


# --- Padding ---


def test_rows_are_padded_as_asked_and_hold_the_same_ids(processor, both):
    alone = [
        processor(text=text, images=image("0.png"))["input_ids"][0].tolist()
        for text in (SHORT, LONG)
    ]
    longest = len(alone[1])
    cases = {
        (): longest,
        (("padding", "longest"),): longest,
        (("padding", "max_length"), ("max_length", 100)): 100,
        (("padding", "max_length"),): processor.tokenizer.model_max_length,
        (("pad_to_multiple_of", 64),): 64,
        (("padding", "max_length"), ("max_length", 60), ("pad_to_multiple_of", 64)): 64,
    }
    for case, width in cases.items():
        for side in (None, "left", "right"):
            options = dict(case) | ({"padding_side": side} if side else {})
            batch = both(**options)
            assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, width)
            for ids, mask, row in zip(
                batch["input_ids"], batch["attention_mask"], alone, strict=True
            ):
                assert ids[mask.bool()].tolist() == row
                assert mask[0 if side == "right" else -1] == 1
            nested = both(text_kwargs=options)
            assert torch.equal(nested["input_ids"], batch["input_ids"])


def test_the_tokenizers_own_padding_side_is_heard(processor, both):
    assert processor.tokenizer.padding_side == "left"
    processor.tokenizer.padding_side = "right"
    try:
        assert both()["attention_mask"][0, 0] == 1
    finally:
        processor.tokenizer.padding_side = "left"


def test_rows_may_stay_as_they_are(both):
    rows = both(padding=False, return_tensors=None)["input_ids"]
    assert len(rows[0]) < len(rows[1])


def test_a_prompt_longer_than_max_length_is_refused(both):
    for padding in (True, "max_length"):
        with pytest.raises(ValueError, match=r"prompt 1 has \d+ tokens.* max_length is 40"):
            both(padding=padding, max_length=40)


def test_padding_to_no_length_at_all_is_refused(processor, both):
    limit, processor.tokenizer.model_max_length = processor.tokenizer.model_max_length, 10**30
    try:
        with pytest.raises(ValueError, match="needs max_length"):
            both(padding="max_length")
    finally:
        processor.tokenizer.model_max_length = limit


# --- What may be returned beside the ids ---


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_returned_is_what_the_tokenizer_returns(side, processor):
    """Of a rendered chat with its placeholders written out."""
    texts = ("Who?", "A man.", "And then?", "Nobody.")
    chats = [chat({"type": "image"}, *texts[:count]) for count in (2, 4)]
    rendered = processor.apply_chat_template(chats)
    wanted = dict.fromkeys(
        ("return_offsets_mapping", "return_token_type_ids", "return_length"), True
    )
    ours = processor(
        text=rendered,
        images=[image("0.png"), image("1.png")],
        padding_side=side,
        return_special_tokens_mask=True,
        **wanted,
    )
    expanded = [text.replace("<image>", "<image>" * 16) for text in rendered]
    theirs = processor.tokenizer(
        expanded, add_special_tokens=False, padding=True, padding_side=side, **wanted
    )
    for name in ("input_ids", "attention_mask", "offset_mapping", "token_type_ids", "length"):
        assert ours[name].tolist() == torch.tensor(theirs[name]).tolist(), name
    special = torch.isin(ours["input_ids"], torch.tensor(processor.tokenizer.all_special_ids))
    assert torch.equal(ours["special_tokens_mask"].bool(), special)


def test_the_attention_mask_may_be_left_out_and_arrays_may_be_numpys(both):
    batch = both(return_attention_mask=False, return_tensors="np")
    assert set(batch) == {"input_ids", "pixel_values"}
    assert isinstance(batch["input_ids"], np.ndarray)
    again = both(text_kwargs={"return_tensors": "np"})
    assert isinstance(again["input_ids"], np.ndarray)


def test_offsets_of_a_prompt_that_is_no_single_text_are_refused(both):
    with pytest.raises(ValueError, match="need a rendered chat"):
        both(return_offsets_mapping=True)


# --- What is refused ---


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"truncation": True}, "truncation could cut through an image"),
        ({"truncation": "longest_first", "max_length": 50}, "truncation could cut"),
        ({"return_overflowing_tokens": True}, "belongs to truncation"),
        ({"stride": 2}, "belongs to truncation"),
        ({"is_split_into_words": True}, "prompts are texts"),
        ({"text_pair": "more"}, "a prompt is one text"),
        ({"text_kwargs": {"text_target": "more"}}, "made by sqllava.encoding"),
        ({"sanitize_control_tokens": True}, "count images by their marks"),
        ({"videos": [np.zeros((2, 8, 8, 3), np.uint8)]}, "videos are not possible"),
        ({"audio": np.zeros(9)}, "audio is not possible"),
        ({"image_seq_length": 4}, "not for a call to choose"),
        ({"crop_size": {"height": 28, "width": 28}}, r"pictures of \(3, 56, 56\)"),
        ({"data_format": "channels_last"}, "data_format='channels_first'"),
        ({"do_center_crop": False, "do_pad": False, "size": {"shortest_edge": 40}}, "leave size"),
    ],
)
def test_what_cannot_be_done_is_refused(options, told, both):
    with pytest.raises(ValueError, match=told):
        both(**options)


def test_what_says_that_nothing_is_wanted_is_taken(both):
    plain = both()["input_ids"]
    for options in (
        {"truncation": False},
        {"truncation": "do_not_truncate"},
        {"truncation": None, "stride": None},
        {"videos": None, "audio": None},
        {"videos": []},
    ):
        assert torch.equal(both(**options)["input_ids"], plain)


def test_images_belong_to_their_own_prompts(processor):
    picture = image("0.png")
    with pytest.raises(ValueError, match="prompt 0 has 1 <image> marks, but 2 images"):
        processor(text=[SHORT, SHORT], images=[[picture, picture], []])
    with pytest.raises(ValueError, match="2 <image> marks, but 1 images"):
        processor(text=[SHORT, SHORT], images=picture)
    for text in ([], [["USER:", "Hi"]], 3):
        with pytest.raises(ValueError, match="text must be a prompt"):
            processor(text=text)
    with pytest.raises(ValueError, match="give text, images, or both"):
        processor()


# --- Chats ---


@pytest.fixture
def server():
    handler = partial(SimpleHTTPRequestHandler, directory=str(GOLDEN / "images"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_message_names_its_image_in_any_way(processor, server):
    path = GOLDEN / "images" / "1.png"
    encoded = base64.b64encode(path.read_bytes()).decode()
    ways = [
        {"type": "image", "image": image("1.png")},
        {"type": "image", "image": np.asarray(image("1.png").convert("RGB"))},
        {"type": "image", "path": str(path)},
        {"type": "image", "url": f"{server}/1.png"},
        {"type": "image", "base64": encoded},
        {"type": "image", "url": f"data:image/png;base64,{encoded}"},
        {"type": "image_url", "image_url": {"url": f"{server}/1.png"}},
    ]
    wanted = processor.prepare_image(image("1.png"))
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    ids = []
    for way in ways:
        inputs = processor.apply_chat_template(chat(way, "Who?"), **options)
        assert torch.equal(inputs["pixel_values"][0], wanted), way
        ids.append(inputs["input_ids"].tolist())
    assert all(row == ids[0] for row in ids)
    batch = processor.apply_chat_template([chat(way, "Who?") for way in ways], **options)
    assert batch["pixel_values"].shape == (len(ways), 3, 56, 56)
    assert torch.equal(batch["pixel_values"], wanted.expand(len(ways), -1, -1, -1))


def test_an_answer_that_is_begun_goes_on(processor):
    begun = chat({"type": "image", "image": image("0.png")}, "Who?", "A man")
    inputs = processor.apply_chat_template(
        begun, continue_final_message=True, tokenize=True, return_dict=True
    )
    opened = processor.apply_chat_template(
        begun[:1], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    rest = inputs["input_ids"][0, opened["input_ids"].shape[1] :]
    assert processor.tokenizer.decode(rest) == "A man"


def test_chats_of_other_media_are_refused(processor):
    with pytest.raises(Exception, match="text and images, and not: video"):
        processor.apply_chat_template(chat({"type": "video", "video": "a.mp4"}, "Who?"))


def test_the_mask_of_a_batch_covers_the_answers(processor):
    picture = {"type": "image", "image": image("0.png")}
    chats = [chat(picture, "Who?", "A man."), chat(picture, "Who?", "A man.", "Sure?", "Yes.")]
    for side in ("left", "right"):
        inputs = processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding_side": side},
        )
        texts = [
            processor.tokenizer.decode(ids[mask.bool()])
            for ids, mask in zip(inputs["input_ids"], inputs["assistant_masks"], strict=True)
        ]
        assert texts == ["A man.</s>", "A man.</s> Yes.</s>"], side
