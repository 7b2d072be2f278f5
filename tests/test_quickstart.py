"""The quickstart's smoke run: every step of the whole path, and that none is done twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from training import REPO, environment

STEPS = ("data", "stage1", "stage2", "eval", "demo", "report")


def quickstart(output: Path) -> str:
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh"],
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
def test_the_smoke_run_takes_every_step_once(tmp_path):
    shown = quickstart(tmp_path)
    assert "skipped" not in shown
    assert "VUSER 3: " in shown  # the demo's questions
    assert all((tmp_path / "done" / step).exists() for step in STEPS)
    figures = json.loads((tmp_path / "eval" / "figures.json").read_text())
    assert (figures["scenes"], figures["questions"]) == (40, 120)
    assert f"{100 * figures['vqa_accuracy']:.1f} %" in shown
    page = (tmp_path / "report" / "index.html").read_text()
    assert "<script src=" not in page and len(page) > 10_000

    again = quickstart(tmp_path)
    assert again.count("skipped, the result is there") == len(STEPS)
