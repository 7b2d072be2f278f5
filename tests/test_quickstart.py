"""The quickstart's smoke run, and what goes on from it: every step, and that none is done twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from training import REPO, environment

from sqllava.data.records import iter_records

STEPS = ("data", "stage1", "stage2", "eval", "demo", "report")


def smoke_run(script: str, output: Path, *words: str) -> str:
    done = subprocess.run(
        ["bash", script, *words],
        cwd=REPO,
        env=environment(QUICK="1", OUTPUT_DIR=str(output)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    not (Path(sys.prefix) / ".sqllava-train").exists(),
    reason="not in an environment of scripts/test.sh, where nothing is left to install",
)
def test_every_step_is_taken_once_and_own_records_train_beside_the_worlds(tmp_path):
    shown = smoke_run("scripts/quickstart.sh", tmp_path)
    assert "skipped" not in shown
    assert "VUSER 3: " in shown  # the demo's questions
    assert all((tmp_path / "done" / step).exists() for step in STEPS)
    figures = json.loads((tmp_path / "eval" / "figures.json").read_text())
    assert (figures["scenes"], figures["questions"]) == (40, 120)
    assert f"{100 * figures['vqa_accuracy']:.1f} %" in shown
    assert (tmp_path / "report" / "index.html").stat().st_size > 10_000
    again = smoke_run("scripts/quickstart.sh", tmp_path)
    assert again.count("skipped, the result is there") == len(STEPS)

    table = smoke_run("demo/shapes/compare_self_qa.sh", tmp_path, "5")
    folder = tmp_path / "self_qa"
    people, own = (list(iter_records(folder / f"{name}.json")) for name in ("people", "own"))
    assert [record["image"] for record in own] == [record["image"] for record in people]
    for name, line in zip(("people", "own"), table.splitlines()[-2:], strict=True):
        figures = json.loads((folder / f"{name}-5-eval" / "figures.json").read_text())
        right = f"{100 * figures['vqa_accuracy']:.1f}"
        assert line.split() == [name, right, right]
