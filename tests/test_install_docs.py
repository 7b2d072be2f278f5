"""docs/install.md: its extras are pyproject.toml's, and its errors are those that are printed."""

import re

from conftest import REPO

PAGE = (REPO / "docs" / "install.md").read_text()


def test_the_extras_are_those_of_the_project():
    # A line `name = [...]` for each, after the table's head: tomllib is younger than Python 3.10.
    project = (REPO / "pyproject.toml").read_text()
    table = project.partition("[project.optional-dependencies]\n")[2].partition("\n\n")[0]
    extras = {line.partition(" =")[0] for line in table.splitlines()}
    described = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    installed = {
        name for names in re.findall(r"-e '\.\[(.*?)\]'", PAGE) for name in names.split(",")
    }
    assert described == extras
    assert installed <= extras


def test_errors_in_the_table_are_those_of_the_scripts():
    launch = (REPO / "scripts" / "launch.sh").read_text()
    errors = re.findall(r"^\| `error: (.*?)` \|", PAGE, re.MULTILINE)
    assert errors and all(f'fail "{error}' in launch for error in errors)
