"""Two ranks on data of which 1 % is bad: the run ends, and the log names each bad record once."""

import json
import random
import re
import shutil
import subprocess
import sys

import pytest
from training import GOLDEN, environment, flags, history, write_data


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip", "replace"])
def test_two_ranks_stay_in_step_over_bad_images(tmp_path, policy):
    data = write_data(tmp_path / "data.json", "mixed", count=200)
    records = json.loads(data.read_text())
    images = tmp_path / "images"
    shutil.copytree(GOLDEN / "images", images)
    whole = (images / "0.png").read_bytes()
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    with_image = [record for record in records if isinstance(record.get("image"), str)]
    bad = with_image[:4]
    for record, name in zip(bad, ("missing.png", "cut.png", "missing.png", "cut.png"), strict=True):
        record["image"] = name
    data.write_text(json.dumps(records))

    # One record a step and rank, so that a bad one is the whole of its rank's batch; two epochs,
    # so that it comes twice.
    changes = {"per_device_train_batch_size": 1, "max_steps": None, "num_train_epochs": 2}
    words = flags(2, data, tmp_path / "out", image_folder=images, bad_samples=policy, **changes)
    port = str(random.randint(20000, 50000))
    launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "sqllava.train", *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    entries = history(tmp_path / "out")
    assert len(entries) == 200 and entries[-1]["bad_samples"] == 8
    named = re.findall(r"record \d+ was not used: .*?record \d+ \(id '([^']+)'\)", done.stderr)
    assert sorted(named) == sorted(record["id"] for record in bad)
