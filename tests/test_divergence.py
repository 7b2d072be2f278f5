"""A run that diverges says where, ends with an error, and leaves the last whole checkpoint."""

import re

import pytest
import torch
from training import flags, write_data

from sqllava.train import run
from sqllava.train.divergence import DivergenceError, FiniteSteps, check_weights
from sqllava.train.trainer import last_complete_checkpoint


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data.json", "image", count=16)


def test_a_rate_far_too_high_ends_the_run_with_its_step_and_records(data, tmp_path):
    rates = {"learning_rate": 1e30, "vision_tower_lr": 1e30, "warmup_steps": 0}
    saves = {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(SystemExit) as error:
        run.main(flags(2, data, tmp_path / "out", max_steps=4, **rates, **saves))
    said = re.fullmatch(
        r"error: training has diverged: step (\d) has a .*records in (.*) are ([\d, ]+)\. The .*",
        str(error.value.code),
    )
    assert said and said[2] == str(data) and len(said[3].split(",")) == 4
    diverged = int(said[1])
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    last = last_complete_checkpoint(tmp_path / "out")
    assert last is not None and last.name == f"checkpoint-{diverged - 1}"


def test_each_number_that_is_none_is_a_divergence():
    steps = FiniteSteps("data.json")
    steps.saw(torch.tensor(2.0), [3, 1])
    steps.end_step(1, 0.5)
    steps.end_step(1, None)
    for loss, norm, what in [
        (float("nan"), 0.5, "a loss of nan"),
        (float("inf"), None, "a loss of inf"),
        (1.0, float("inf"), "a gradient norm of inf"),
        (float("nan"), torch.tensor(float("nan")), "a gradient norm of nan and a loss of nan"),
    ]:
        steps.saw(torch.tensor(1.0), [7])
        steps.saw(torch.tensor(loss), [3, 1])
        with pytest.raises(DivergenceError, match=f"step 2 has {what}.*data.json are 1, 3, 7"):
            steps.end_step(2, norm)
    steps.end_step(3, 1.0)


def test_a_loss_scale_may_look_for_its_place():
    steps = FiniteSteps("data.json", gradients=False)
    steps.saw(torch.tensor(1.0), [0])
    steps.end_step(1, float("inf"))


def test_weights_that_are_not_finite_are_not_saved():
    model = torch.nn.Linear(2, 2)
    check_weights(model)
    with torch.no_grad():
        model.weight[0, 1] = float("nan")
    with pytest.raises(DivergenceError, match=r"no longer finite \(weight\)"):
        check_weights(model)
    model.weight.requires_grad_(False)
    check_weights(model)
