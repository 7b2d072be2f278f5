"""The data documents: their commands parse, their numbers are the table's, their records train."""

import json
import re
import shlex
import subprocess

import pytest
from test_scripts import commands
from training import GOLDEN, REPO, flags, losses

from sqllava.data.check import Examiner, check
from sqllava.data.cli import build_parser
from sqllava.data.sources import SOURCES, image_folders
from sqllava.data.view import open_view
from sqllava.train import run

PAGES = [REPO / "docs" / "data.md", REPO / "docs" / "Finetune_Custom_Data.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_data_commands_in_the_documents_parse(page):
    found = 0
    for command in commands(page):
        words = shlex.split(command, comments=True)
        if words[:2] == ["sqllava", "data"]:
            build_parser().parse_args(words[2:])
        elif words[:2] == ["bash", "download_data.sh"]:
            build_parser().parse_args(["download", *words[2:]])
        else:
            continue
        found += 1
    assert found >= 4


def test_the_table_and_the_tree_are_those_of_the_code():
    text = PAGES[0].read_text()
    table = [line for line in text.splitlines() if line.startswith("| `")]
    named = {name for line in table for name in re.findall("`([^`]+)`", line.split("|")[1])}
    assert named == set(SOURCES)
    tree = re.search("```none\n(.*?)```", text, re.DOTALL)[1]
    leaves = {line.split("── ")[1] for line in tree.splitlines() if "── " in line}
    assert leaves == {
        *image_folders(),
        *(s.parts[0].path for s in SOURCES.values() if not s.parts[0].unpack_to),
    }
    for count in (558_128, 118_287, 148_854, 207_572, 25_119, 64_346, 43_903):
        assert f"{count:,}" in text


def test_the_download_script_asks_the_command(tmp_path):
    done = subprocess.run(
        ["bash", "-n", str(REPO / "download_data.sh")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    last = (REPO / "download_data.sh").read_text().splitlines()[-1]
    assert last == 'exec sqllava data download "$@"'


@pytest.fixture
def worked_records(tmp_path):
    (block,) = re.findall("```json\n(.*?)```", PAGES[1].read_text(), flags=re.DOTALL)
    path = tmp_path / "my.json"
    path.write_text(block)
    return path


def test_the_worked_records_pass_the_check(worked_records):
    view = open_view(str(GOLDEN / "vicuna-tiny"))
    images = GOLDEN / "images"
    report = check(Examiner(worked_records, images, True, view, "v1_sq", 0.5, 2048))
    assert (report.records, report.faults, report.stopped) == (5, [], "")
    assert (report.text_only, report.several_images) == (1, 1)
    assert len(json.loads(worked_records.read_text())) == 5


def test_the_worked_records_train(worked_records, tmp_path):
    output = tmp_path / "out"
    changes = {"per_device_train_batch_size": 5, "max_steps": 8, "learning_rate": 1e-2}
    run.main(flags(2, worked_records, output, lora_dropout=0, lora_dropout_vit=0, **changes))
    found = losses(output)
    assert len(found) == 8 and found[-1] < found[0]
