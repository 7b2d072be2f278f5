"""The evaluation's shell scripts and documented commands name tasks and flags that exist."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from sqllava.eval.cli import build_parser
from sqllava.eval.tasks import TASKS

REPO = Path(__file__).resolve().parent.parent
SCRIPTS = [path for path in sorted((REPO / "scripts/eval").glob("*.sh")) if path.stem != "common"]
STAND_IN = """#!/bin/sh
for word in "$0" "$@"; do printf "%s\\t" "$word"; done >>"$SAID"
echo >>"$SAID"
"""
NAMES = {"sqa": "scienceqa", "captioning": "coco"}


@pytest.fixture
def stage(tmp_path):
    """A folder with question files, and stand-ins for python and torchrun that note their words."""
    for folder in ("coco", "nocaps"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        (tmp_path / "data" / folder / "question3.jsonl").write_text("")
    for name in ("python", "torchrun"):
        stand_in = tmp_path / "bin" / name
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text(STAND_IN)
        stand_in.chmod(0o755)
    return tmp_path


def said(stage, script, *words, **variables):
    environment = {
        "PATH": f"{stage / 'bin'}:/usr/bin:/bin",
        "MODEL": "models/my",
        "DATA": str(stage / "data"),
        "SAID": str(stage / "said"),
        **variables,
    }
    subprocess.run(["bash", str(script), *words], env=environment, check=True, cwd=stage)
    return [line.split("\t")[:-1] for line in (stage / "said").read_text().splitlines()]


def parsed(command):
    """The words after the module's name, parsed."""
    words = command[command.index("sqllava.eval.cli") + 1 :]
    return build_parser(words).parse_args(words)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_call_the_command_with_flags_it_has(script, stage):
    commands = said(stage, script, "--limit", "3", OPENAI_API_KEY="x", NPROC="1")
    first = parsed(commands[0])
    assert first.task == NAMES.get(script.stem, script.stem)
    assert (first.model, first.limit, first.output) == ("models/my", 3, Path("results/my"))
    for command in commands:
        parsed(command)
    if script.stem in ("llavabench", "mmvet"):
        assert [command[3] for command in commands][-2:] == ["judge", "score"]
    if script.stem == "captioning":
        assert [parsed(command).task for command in commands] == ["coco", "nocaps"]


def test_every_task_has_a_script():
    named = {NAMES.get(path.stem, path.stem) for path in SCRIPTS}
    assert set(TASKS) - {"flickr30k", "nocaps", "conceptual"} <= named


def test_several_gpus_share_the_work(stage):
    (command, *_) = said(stage, REPO / "scripts/eval/gqa.sh", NPROC="4", BASE="vicuna")
    assert command[0].endswith("torchrun")
    assert command[1:4] == ["--standalone", "--nproc_per_node", "4"]
    assert parsed(command).base == "vicuna"


def test_without_a_model_the_script_says_so(stage):
    done = subprocess.run(
        ["bash", str(REPO / "scripts/eval/pope.sh")],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "set MODEL" in done.stderr


def test_documented_commands_parse():
    text = (REPO / "docs/Evaluation.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.DOTALL)
    commands = "\n".join(blocks).replace("\\\n", " ").splitlines()
    shown = [shlex.split(line, comments=True) for line in commands if "sqllava eval" in line]
    assert len(shown) > 10
    for words in shown:
        words = words[words.index("eval") + 1 :]
        build_parser(words).parse_args(words)
    for name in TASKS:
        assert f"`{name}`" in text, name
