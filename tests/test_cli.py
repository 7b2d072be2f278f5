"""The `sqllava` command: help, unknown commands, and every command's own --help."""

from importlib import import_module

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
