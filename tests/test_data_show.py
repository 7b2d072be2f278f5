"""What is shown of a record is what training makes of it."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from training import GOLDEN

from sqllava.data.cli import main
from sqllava.data.dataset import InstructionDataset
from sqllava.data.index import open_index
from sqllava.data.show import Settings, in_terminal, look
from sqllava.data.view import open_view
from sqllava.encoding import IGNORE_INDEX

RECORD = {
    "id": "one",
    "image": "0.png",
    "conversations": [
        {"from": "human", "value": "What is it?\n<image>"},
        {"from": "gpt", "value": "A dog & a <cat> 日."},
        {"from": "human", "value": "Which is bigger?"},
        {"from": "gpt", "value": "The dog."},
    ],
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data.json"
    bad = {"id": "bad", "image": "0.png", "conversations": RECORD["conversations"][2:]}
    path.write_text(json.dumps([RECORD, bad, 7]))
    return path


def run(capsys, *words) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(["show", *map(str, words)])
    return stop.value.code, capsys.readouterr().out


def settings(**changes) -> Settings:
    values = {"view": open_view(str(GOLDEN / "vicuna-tiny")), "template": "v1_sq", "sq_r": 1.0}
    values |= {"max_length": 2048, "images": GOLDEN / "images", "seed": 42}
    return Settings(**(values | changes))


def test_without_a_model_the_trained_text_is_marked(file, capsys):
    code, shown = run(capsys, file, "-i", 0, "--sq_r", 1)
    assert code == 0
    assert "USER: <image>\nWhat is it? ASSISTANT:⟦ A dog & a <cat> 日.</s>⟧" in shown
    assert "VUSER:⟦ Which is bigger?</s>⟧ ASSISTANT:⟦ The dog.</s>⟧" in shown
    assert "image 0.png: not looked for" in shown
    assert "VUSER" not in run(capsys, file, "--template", "v1")[1].replace("virtual user", "")


@pytest.mark.parametrize("sq_r", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("max_length", [2048, 815])
def test_tokens_are_those_of_the_dataset(file, sq_r, max_length):
    chosen = settings(sq_r=sq_r, max_length=max_length)
    view = chosen.view
    dataset = InstructionDataset(
        open_index(file),
        chosen.images,
        view.tokenizer,
        view.prepare_image,
        "v1_sq",
        view.image_tokens,
        max_length,
        sq_r,
        seed=42,
    )
    sample, shown = dataset[0], look(RECORD, 0, chosen)
    assert [token.id for token in shown.tokens] == sample.input_ids.tolist()
    trained = (sample.labels != IGNORE_INDEX).tolist()
    assert [token.trained for token in shown.tokens] == trained
    assert shown.dropped_turns == sample.dropped_turns
    assert sum(token.kind == "image" for token in shown.tokens) == 576


def test_the_terminal_has_text_in_color_and_the_counts():
    shown = look(RECORD, 0, settings())
    text = in_terminal(shown, color=True)
    assert "\033[1;32m A dog & a <cat> 日.</s>\033[0m" in text
    assert "<image x 576>" in text and "336x336" in text
    trained = sum(token.trained for token in shown.tokens)
    assert f"{len(shown.tokens)} tokens, 576 of them the image's, {trained} trained" in text


def test_the_picture_is_what_the_model_sees():
    wide = settings(images=GOLDEN / "images")
    (_, _, seen) = look(RECORD, 0, wide).images[0]
    image = Image.open(GOLDEN / "images" / "0.png").convert("RGB")
    assert seen.size == (336, 336)
    values = wide.view.prepare_image(image).numpy()
    table = wide.view.prepare_image.table
    for channel in range(3):
        assert np.array_equal(values[channel], table[channel][np.asarray(seen)[:, :, channel]])


def test_a_page_of_many(file, tmp_path, capsys):
    page = tmp_path / "page.html"
    words = ("--images", GOLDEN / "images", "--model", GOLDEN / "vicuna-tiny")
    code, shown = run(capsys, file, "-n", 9, "--html", page, *words)
    assert code == 1 and "3 records" in shown
    text = page.read_text()
    assert text.count("<article>") == 3 and "record 0, id &#x27;one&#x27;" in text
    assert "image &times; 576" in text and "&lt;" in text and "<cat>" not in text
    assert text.count('class="fault"') == 2
    data = re.search(r'src="data:image/png;base64,([^"]+)"', text)[1]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (336, 336)
    trained = re.findall(r'<span class="t trained" title="\d+">([^<]*)</span>', text)
    assert "dog" in "".join(trained)


def test_a_bad_record_is_shown_with_its_fault(file, capsys):
    code, shown = run(capsys, file, "-i", 1)
    assert code == 1 and "NOT USABLE: found 0 <image> marks" in shown
    assert "NOT USABLE: a record must be a JSON object, found 7" in run(capsys, file, "-i", 2)[1]


def test_a_number_beyond_the_file_is_an_error(file):
    with pytest.raises(SystemExit, match="no record 3; it has 3"):
        main(["show", str(file), "-i", "3"])
    with pytest.raises(SystemExit, match="no such data file"):
        main(["show", "nowhere.json"])


@pytest.mark.parametrize("count", [0, -3])
def test_a_count_of_none_is_an_error(file, count):
    with pytest.raises(SystemExit, match=f"--count must be at least 1, found {count}"):
        main(["show", str(file), "-n", str(count)])


def test_fewer_records_than_asked_for_are_said(file, caplog, capsys):
    run(capsys, file, "-i", 1, "-n", 5)
    assert "data.json: ends with record 2; fewer than asked for" in caplog.text


@pytest.mark.parametrize("command", ["show", "check"])
def test_a_share_beyond_one_is_an_error_of_the_flag_not_of_the_records(file, command):
    with pytest.raises(SystemExit, match=r"error: the self-questioning ratio must be in .*2\.0"):
        main([command, str(file), "--sq-r", "2"])


def models(tmp_path) -> dict[str, str]:
    """Values of --model that name no model, with what is said of each."""
    folders = {
        "empty": {},
        "code": {"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["x.Y", null]}}'},
        "broken": {"processor_config.json": "{", "tokenizer.json": ""},
        "odd": {"tokenizer.json": "[]"},
        "adapter": {"adapter_config.json": "{}"},
    }
    for name, files in folders.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
    return {
        "lmms-lab/none": r"no model of the hub .*download it first \(hf download lmms-lab/none\)",
        "https://huggingface.co/a/b": "no such folder, and no model of the hub",
        "some/where/deep": "no such folder, and no model of the hub",
        "a\tb": "no such folder",
        str(tmp_path / "data.json"): "a file; name the model's folder",
        str(tmp_path / "empty"): "holds no tokenizer; expected one of tokenizer.json",
        str(tmp_path / "code"): "it wants to run code of its own, which is never done",
        str(tmp_path / "broken"): "its tokenizer does not open: ",
        str(tmp_path / "odd"): "its tokenizer does not open: ",
        str(tmp_path / "adapter"): "an adapter without its processor's files; name its base",
    }


def test_a_model_that_does_not_open_is_named_with_the_reason(file, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    for model, reason in models(tmp_path).items():
        for command in ("show", "check", "index"):
            with pytest.raises(SystemExit) as stop:
                main([command, str(file), "--model", model])
            message = str(stop.value)
            assert re.match(f"error: --model {re.escape(model)}: .*{reason}", message), message
            assert "\n" not in message
