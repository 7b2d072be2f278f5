"""The visual self-questioning demo: its flags, a run on a tiny adapter, and its errors."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parent.parent / "demo"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", DEMO / "visual_questioning.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_published_flags_parse_in_both_spellings(demo):
    published = (
        "--model_path m --model_base b --conv-mode v1_sq --temperature 0.2 --top_p 0.9 "
        "--num_beams 2 --lora_pretrain m --do_sample --n_shot 3 --image a.jpg b.jpg"
    )
    args = demo.parse_arguments(published.split())
    assert (args.model_path, args.model_base, args.lora_pretrain) == ("m", "b", "m")
    assert (args.conv_mode, args.temperature, args.top_p, args.num_beams) == ("v1_sq", 0.2, 0.9, 2)
    assert (args.n_shot, args.image, args.do_sample) == (3, ["a.jpg", "b.jpg"], True)
    hyphens = published.replace("_p", "-p").replace("_b", "-b").replace("n_shot", "n-shot")
    hyphens = hyphens.replace("do_s", "do-s").replace("conv-mode", "conv_mode")
    assert demo.parse_arguments(hyphens.split()) == args
    older = demo.parse_arguments(["--model-path=m", "--image-file", "a.jpg", "--version=v1_sq"])
    assert (older.image, older.conv_mode) == (["a.jpg"], "v1_sq")
    assert (older.temperature, older.top_k, older.top_p) == (1.2, 300, 0.95)


def test_it_describes_asks_and_answers(demo, adapter, golden, capsys):
    images = [str(golden / "images" / name) for name in ("0.png", "1.png")]
    flags = ["--model_path", str(adapter), "--n_shot", "2", "--max_new_tokens", "4", "--seed", "0"]
    demo.main([*flags, "--image", *images, "--json"])
    conversations = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [conversation["image"] for conversation in conversations] == images
    assert all(len(conversation["exchanges"]) == 2 for conversation in conversations)
    assert set(conversations[0]["exchanges"][0]) == {"question", "answer"}
    demo.main([*flags, "--image", images[0]])
    shown = capsys.readouterr().out
    assert shown.startswith(images[0])
    assert f"VUSER 2: {conversations[0]['exchanges'][1]['question']}" in shown


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--image", "nowhere.jpg"], "error: no such image: nowhere.jpg"),
        (["--image", __file__], "cannot be read as an image"),
        (["--model_path", "nowhere", "--image", "0.png"], "no model folder nowhere: train one"),
        (["--lora_pretrain", "other", "--image", "0.png"], "leave --lora_pretrain out"),
        (["--conv-mode", "v2", "--image", "0.png"], "unknown conversation template 'v2'"),
        (["--conv-mode", "v1", "--image", "0.png"], "template 'v1' has no role that asks"),
        (["--n_shot", "0", "--image", "0.png"], "samples must be at least 1, found 0"),
    ],
)
def test_errors_are_one_clear_line(demo, adapter, golden, monkeypatch, flags, told):
    monkeypatch.chdir(golden / "images")
    with pytest.raises(SystemExit, match="^error: [^\n]*$") as error:
        demo.main(["--model_path", str(adapter), "--max_new_tokens", "2", *flags])
    assert told in str(error.value)


def test_the_script_hands_its_arguments_on(adapter, golden):
    script = ["bash", str(DEMO / "run_sq.sh")]
    assert subprocess.run(script, capture_output=True).returncode == 2
    done = subprocess.run(
        [*script, str(golden / "images" / "0.png"), "--json", "--max_new_tokens", "2"],
        capture_output=True,
        text=True,
        env={
            "MODEL": str(adapter),
            "N_SHOT": "1",
            "PYTHON": sys.executable,
            "PATH": "/usr/bin:/bin",
        },
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["exchanges"]) == 1
