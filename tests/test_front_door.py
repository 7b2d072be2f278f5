"""The front door: importing the package and asking any command for help loads nothing heavy.

Modules are counted, not seconds; each check is a process of its own.
"""

import json
import subprocess
import sys

import pytest

from sqllava import cli
from sqllava.data.cli import COMMANDS as DATA_COMMANDS

HEAVY = ("torch", "transformers", "peft", "accelerate", "deepspeed", "gradio", "datasets")
EVAL_COMMANDS = ("list", "check", "prepare", "run", "merge", "score", "submit", "judge", "compare")
HELPS = [
    [],
    *([name] for name in cli.COMMANDS),
    *(["data", name] for name in DATA_COMMANDS),
    *(["eval", name] for name in (*EVAL_COMMANDS, "report", "selfq")),
]


def loaded(code: str) -> set[str]:
    """The top-level modules that a process of its own has loaded after some code."""
    tail = "\nimport sys, json; sys.stderr.write('\\n' + json.dumps([*sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stderr.rpartition("\n")[2])}


def of_command(words: list[str]) -> str:
    return (
        f"from sqllava.cli import main\ntry: main({words!r})\n"
        "except SystemExit as stop: assert not stop.code"
    )


def test_importing_the_package_loads_the_standard_library_alone():
    others = loaded("import sqllava") - loaded("") - set(sys.stdlib_module_names)
    assert others == {"sqllava"}


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_help_loads_nothing_heavy(words):
    assert loaded(of_command([*words, "--help"])).isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "words", [["data", "download", "--list"], ["eval", "list"], ["eval", "list", "pope"]]
)
def test_what_needs_no_model_loads_no_torch(words):
    assert loaded(of_command(words)).isdisjoint(HEAVY)


def test_looking_at_records_without_a_model_loads_no_torch(tmp_path):
    record = {
        "id": "a",
        "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}],
    }
    file = tmp_path / "records.json"
    file.write_text(json.dumps([record]))
    for words in (["check", str(file)], ["index", str(file)], ["show", str(file)]):
        assert loaded(of_command(["data", *words])).isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "first", ["sqllava", "transformers", "sqllava.model.processor", "sqllava.encoding"]
)
def test_the_auto_classes_know_the_model_in_whatever_order_things_are_imported(first):
    loaded(
        f"import {first}, sqllava\n"
        "from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText\n"
        "config = AutoConfig.for_model('sqllava')\n"
        "assert type(config) is sqllava.SQLlavaConfig\n"
        "assert AutoModel._model_mapping[type(config)] is sqllava.SQLlavaModel\n"
        "ours = sqllava.SQLlavaForConditionalGeneration\n"
        "assert AutoModelForImageTextToText._model_mapping[type(config)] is ours\n"
        "from transformers.models.auto.processing_auto import processor_class_from_name\n"
        "assert processor_class_from_name('SQLlavaProcessor') is sqllava.SQLlavaProcessor\n"
    )


def test_a_name_that_is_not_there_is_an_attribute_error():
    import sqllava

    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = sqllava.lod
    assert {"load", "SelfQuestioner", "SQLlavaProcessor"} <= set(dir(sqllava))


def test_the_trainers_help_shows_our_flags_with_their_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = capsys.readouterr().out
    for flag in ("--sq_r", "--vit_lora_enable", "--mm_projector_lr", "--bad_samples", "--help_all"):
        assert flag in shown
