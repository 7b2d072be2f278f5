"""Runs several trainings one after another in one process group; started by test_deepspeed.py.

deepspeed ... deepspeed_worker.py RUNS.json      a list of flag lists
"""

import gc
import json
import sys

from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sqllava.model import loss
from sqllava.train import run


def main() -> None:
    with open(sys.argv[-1]) as handle:
        runs = json.load(handle)
    has_operator = loss._has_operator
    loss.CHUNK = 8  # tiny data, too, take the way of many labelled tokens
    for number, words in enumerate(runs):
        # By torch's operator, and by our own chunks in every other run.
        loss._has_operator = (lambda: False) if number % 2 else has_operator
        run.train(words)
        # accelerate keeps one state a process; the next run has another configuration.
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
        unset_hf_deepspeed_config()
        gc.collect()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    with run.whole_process():
        main()
