"""lmms-eval finds the model "sqllava" and runs a task of its own form on a checkpoint of ours."""

import json
import os
import subprocess
import sys

import pytest
from eval_data import REPO, copy_tiny_model, lines, picture

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (it is no dependency)")

TASK = """
task: shapes_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 4
  temperature: 0
  do_sample: false
process_results: !function utils.process_results
metric_list:
  - metric: said_something
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
from PIL import Image

def doc_to_visual(doc):
    return [Image.open(doc["image"])] if doc["image"] else []

def doc_to_text(doc, kwargs=None):
    return doc["question"]

def process_results(doc, results):
    return {"said_something": float(isinstance(results[0], str))}
"""


@pytest.mark.slow
def test_a_local_task_runs_on_our_checkpoint(tmp_path):
    model = copy_tiny_model(tmp_path / "tiny")
    task = tmp_path / "task"
    task.mkdir()
    for n in range(2):
        picture(tmp_path / f"{n}.jpg", n)
    rows = [
        {
            "image": str(tmp_path / f"{n % 2}.jpg") if n < 4 else "",
            "question": f"What is it, {n}?",
            "answer": "red",
        }
        for n in range(6)
    ]
    data = lines(tmp_path / "data.jsonl", rows)
    (task / "shapes_local.yaml").write_text(TASK.format(data=data))
    (task / "utils.py").write_text(UTILS)
    command = [sys.executable, "-m", "lmms_eval", "--model", "sqllava", "--batch_size", "4"]
    command += ["--model_args", f"pretrained={model},device=cpu", "--tasks", "shapes_local"]
    command += ["--include_path", str(task), "--output_path", str(tmp_path / "out")]
    environment = os.environ | {
        "PYTHONPATH": str(REPO),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*command, "--log_samples"], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("*results.json")
    scores = json.loads(results.read_text())["results"]["shapes_local"]
    assert scores["said_something,none"] == 1.0
    (samples,) = (tmp_path / "out").rglob("*samples*.jsonl")
    assert len(samples.read_text().splitlines()) == 6
