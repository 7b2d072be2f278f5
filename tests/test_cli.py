"""The `sqllava` command: help, unknown commands, and every command's own --help."""

import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest

from sqllava import cli


def test_help_names_every_command(capsys):
    cli.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in cli.COMMANDS)


def test_an_unknown_command_is_an_error_that_lists_the_known_ones():
    with pytest.raises(SystemExit, match="no command 'trian'(?s:.*)train"):
        cli.main(["trian"])


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_main_and_help(name, capsys):
    assert callable(import_module(cli.COMMANDS[name][0]).main)
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch):
    def import_module(name):
        raise ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow")

    monkeypatch.setattr(cli, "import_module", import_module)
    told = r"^error: pyarrow is not installed: pip install 'sqllava\[train\]'$"
    with pytest.raises(SystemExit, match=told):
        cli.main(["data", "check"])
    with pytest.raises(ModuleNotFoundError):
        cli.main(["ask", "a.jpg"])  # Needs no extra: what is missing is a fault.


def test_an_interrupt_ends_a_command_without_a_traceback(monkeypatch):
    def stopped(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(main=stopped))
    with pytest.raises(SystemExit) as stop:
        cli.main(["ask"])
    assert stop.value.code == 130


def test_options_may_be_spelled_with_hyphens_or_underscores():
    parser = cli.Parser()
    parser.add_argument("--vision-tower")
    parser.add_argument("rest", nargs="*")
    for option in ("--vision-tower", "--vision_tower"):
        for given in ([option, "a_b"], [f"{option}=a_b"]):
            assert parser.parse_args(given).vision_tower == "a_b"
    assert parser.parse_args(["--", "--a_b"]).rest == ["--a_b"]


# A command that writes until it is stopped, and takes any OSError for its user's mistake.
WRITES_ON = """
import sys
from types import SimpleNamespace
from sqllava import cli

def main(words):
    try:
        while True:
            sys.stdout.write("line\\n" * 1000)
    except OSError as error:
        raise SystemExit(f"error: {error}") from error

cli.import_module = lambda name: SimpleNamespace(main=main)
cli.main(["ask"])
"""


def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word():
    command = [sys.executable, "-c", WRITES_ON]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == 141  # as the shell counts SIGPIPE
