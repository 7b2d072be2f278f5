"""What docs/demo.md and docs/self_questioning.md tell people to type can be typed."""

import ast
import re
import shlex

import pytest
from conftest import REPO

from sqllava import SelfQuestioner
from sqllava.ask import cli as ask
from sqllava.ask.data_engine import VERDICTS
from sqllava.eval import selfq
from sqllava.serve import cli as serve

DOCS = ("demo.md", "self_questioning.md")


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (REPO / "docs" / name).read_text(), re.DOTALL)


def commands():
    """The words of each `sqllava` command, without what goes before a pipe and after a `>`."""
    for name in DOCS:
        for line in "".join(blocks(name, "bash")).splitlines():
            words = shlex.split(line.partition(">")[0].rpartition("|")[2])
            if words[:1] == ["sqllava"]:
                yield words[1:]


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_commands_parse(words):
    if words[:2] == ["eval", "selfq"]:
        assert selfq.parse_arguments(words[2:]).asked
        return
    parse = {"ask": ask.parse_arguments, "serve": serve.parse_arguments}[words[0]]
    assert parse(words[1:]).model


def test_the_commands_are_found():
    assert {words[0] for words in commands()} == {"ask", "serve", "eval"}
    assert len(list(commands())) >= 8


def test_python_parses_and_calls_what_there_is():
    source = "".join(blocks("demo.md", "python"))
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    methods = {
        call.attr
        for call in calls
        if isinstance(call, ast.Attribute) and getattr(call.value, "id", "") == "questioner"
    }
    assert methods == {"encode", "describe", "ask", "answer", "converse"}
    assert all(hasattr(SelfQuestioner, method) for method in methods)


def test_images_and_verdicts_are_those_that_there_are():
    for name in DOCS:
        text = (REPO / "docs" / name).read_text()
        for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
            assert (REPO / "docs" / path).is_file()
    text = (REPO / "docs" / "self_questioning.md").read_text()
    assert all(verdict in text for verdict in VERDICTS)
