"""Runs several trainings one after another in one process group; started by test_deepspeed.py.

deepspeed ... deepspeed_worker.py RUNS.json      a list of flag lists
"""

import gc
import json
import sys

from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sqllava.train import run


def main() -> None:
    with open(sys.argv[-1]) as handle:
        runs = json.load(handle)
    for words in runs:
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
