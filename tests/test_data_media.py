"""What a record names besides its `image` and would go unseen: keys and marks of other media."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_data_check import MARKED, TEXT, examiner

from sqllava.data.check import check
from sqllava.data.records import RecordError, check_record


def text(question: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "Yes."}]


def refused(record, reason) -> None:
    with pytest.raises(RecordError, match=rf"^a\.json: record 4 \(id 'x'\): .*{reason}"):
        check_record({"id": "x", **record}, "a.json", 4)


def accepted(record) -> None:
    check_record({"id": "x", **record}, "a.json", 4)


@pytest.mark.parametrize(
    "key",
    [
        *("video", "videos", "Video", "video_path", "videoPath", "video_file", "video_url"),
        *("audio", "audios", "audio_path", "speech", "sound", "frames", "media", "gif"),
        *("image_path", "images_path", "imagePath", "image_file", "image_name", "image_url"),
        *("img", "imgs", "img_path", "picture", "pictures", "photo", "image2", "image_0"),
        *("pixel_values", "visual_input", "screenshot", "images"),
    ],
)
def test_a_key_that_names_media_is_a_fault_in_a_record_without_an_image(key):
    refused({key: "a.xyz", "conversations": TEXT}, f"found '{key}', which is not read; pictures")
    if key != "images":  # a list of those is read as `image`
        refused({key: ["a.xyz"], "conversations": TEXT}, f"found '{key}', which is not read")
    accepted({key: None, "conversations": TEXT})
    accepted({key: "", "conversations": TEXT})


@pytest.mark.parametrize("key", ["video", "audio_path", "image2", "second_image", "images", "img"])
def test_more_media_beside_the_image_are_a_fault(key):
    refused({"image": "a.jpg", key: "b.xyz", "conversations": MARKED}, f"found '{key}'")


@pytest.mark.parametrize(
    "key", ["image_url", "image_path", "img_file", "image_name", "picture_link"]
)
def test_the_image_may_be_named_once_more(key):
    accepted({"image": "a.jpg", key: "http://example.org/a.jpg", "conversations": MARKED})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_id", "COCO_1"),
        ("image_size", [640, 480]),
        ("image_source", "coco"),
        ("video_id", "v1"),
        ("video_duration", "3 s"),
        ("num_images", 2),
        ("has_image", True),
        ("image_caption", "A dog."),
        ("data_source", "sharegpt"),
        ("width", 640),
        ("model", "gpt-4"),
        ("imagination", "vivid"),
        ("evidence", "none"),
        ("category", "photography"),
        ("1", "x"),
    ],
)
def test_keys_that_tell_about_media_or_of_other_things_are_no_fault(key, value):
    accepted({key: value, "conversations": TEXT})
    accepted({"image": "a.jpg", key: value, "conversations": MARKED})


def test_a_turn_may_not_hide_media_of_its_own():
    hidden = [{**TEXT[0], "image": "a.jpg"}, TEXT[1]]
    refused({"conversations": hidden}, "turn 0: found 'image', which is not read; pictures are")
    refused({"conversations": [TEXT[0], {**TEXT[1], "audio": "a.wav"}]}, "turn 1: found 'audio'")
    accepted({"conversations": [{**TEXT[0], "weight": 1}, {**TEXT[1], "loss": True}]})


@pytest.mark.parametrize(
    "question",
    [
        "<video>\nWhat happens?",
        "What happens?\n<video>",
        " <video>What happens?",
        "<audio>",
        "<img>\nWhat?",
        "<Image>\nWhat?",
        "<image >\nWhat?",
        "What differs, <image_1> or <image_2>?",
        "In <image 1>, what?",
        "<|image_pad|>What?",
        "<|image|>What?",
        "<ImageHere>What?",
        "<video_1> What?",
        "<image_placeholder>\nWhat?",
        "<image_soft_token>What?",
    ],
)
def test_a_mark_of_media_without_an_image_is_a_fault(question):
    refused({"conversations": text(question)}, "turn 0: found the mark '<.*>', which is not read")
    refused({"conversations": TEXT + text(question)}, "turn 2: found the mark")


@pytest.mark.parametrize(
    "question",
    [
        "<video controls>\n<source src='a.mp4'>\n</video> does not play",
        "<video>\n<source src='a.mp4'>\n</video>\nWhy does it not play?",
        "How do I use the <video> tag?",
        "Write <img src='a.jpg'> in Markdown.",
        "What is <imagination>?",
        "if image < 3 and video > 4",
    ],
)
def test_html_and_plain_text_are_no_marks(question):
    accepted({"conversations": text(question)})
    accepted({"conversations": [TEXT[0], {"from": "gpt", "value": f"<video>\n{question}"}]})


def test_beside_an_image_its_number_may_be_named_but_a_video_may_not():
    marked = text("<image>\nWhat is in <image_1>?")
    accepted({"image": "a.jpg", "conversations": marked})
    refused({"image": "a.jpg", "conversations": text("<image>\n<video_1> What?")}, "<video_1>")
    refused({"image": "a.jpg", "conversations": text("What?<image>\n<video>")}, "<video>")


def test_the_check_names_records_of_videos_and_of_other_keys(tmp_path):
    path = tmp_path / "data.json"
    records = [
        {"id": 1, "video": "a.mp4", "conversations": text("<video>\nWhat happens?")},
        {"id": 2, "image_path": "a.jpg", "conversations": TEXT},
        {"id": 3, "messages": [{"role": "user", "content": "Hi", "images": ["a.jpg"]}, TEXT[1]]},
        {"id": 4, "conversations": TEXT},
    ]
    path.write_text(json.dumps(records))
    report = check(examiner(path))
    assert [(f.record, f.id) for f in report.faults] == [(0, "1"), (1, "2"), (2, "3")]
    assert "'video'" in report.faults[0].reason and "'image_path'" in report.faults[1].reason


@given(st.text(), st.text() | st.lists(st.text()) | st.none() | st.integers(), st.text())
def test_any_key_and_any_text_is_accepted_or_named(key, value, question):
    if key not in ("id", "conversations"):
        try:
            check_record({"id": "x", key: value, "conversations": text(question)}, "a.json", 4)
        except RecordError as error:
            assert str(error).startswith("a.json: record 4 (id 'x'): ")
