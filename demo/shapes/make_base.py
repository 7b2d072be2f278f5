"""Makes the miniature world's base models from nothing: tokenizer, vision tower and language model.

    python demo/shapes/make_base.py            # everything, about an hour on two cores
    python demo/shapes/make_base.py --tower    # one part
    python demo/shapes/make_base.py --lm --go-on --minutes 12    # more of the last phase

The results lie in `base/` beside this file, in half precision, as CLIP and Vicuna come trained to
the real system; `base/curves.json` holds how they were learned and how they were checked.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from base_lm import PHASES, text_accuracy, train_lm
from base_tokenizer import make_tokenizer
from base_tower import probe_tower, train_tower, write_preprocessor
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel

logger = logging.getLogger(__name__)

BASE = Path(__file__).parent / "base"
# The share of the budget for the language model, which has the harder task.
_LM_SHARE = 0.6


def save_half(model: PreTrainedModel, folder: Path) -> None:
    """Writes a model's fp16 weights and configuration into a folder that may hold other files.

    Each file is written beside its final place and renamed, so that no reader meets half a file.
    """
    beside = folder.with_name(folder.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    half = type(model)(model.config).to(torch.float16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(beside)
    folder.mkdir(parents=True, exist_ok=True)
    for file in beside.iterdir():
        file.chmod(0o644)
        file.replace(folder / file.name)
    beside.rmdir()


def make_tower(out: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Trains, checks and saves the vision tower."""
    tower, curve = train_tower(minutes=minutes, seed=seed)
    save_half(tower, out / "tower")
    write_preprocessor(out / "tower")
    return {"curve": curve, "probe": probe_tower(tower)}


def make_lm(out: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Trains, checks and saves the language model, for the tokenizer that lies in its folder."""
    tokenizer = AutoTokenizer.from_pretrained(out / "lm", trust_remote_code=False)
    model, curve = train_lm(tokenizer, minutes=minutes, seed=seed)
    return save_lm(out, model, curve)


def go_on_with_lm(out: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Gives the language model that lies there more of the last phase; its rate starts anew."""
    tokenizer = AutoTokenizer.from_pretrained(out / "lm", trust_remote_code=False)
    model = LlamaForCausalLM.from_pretrained(out / "lm", dtype=torch.float32)
    model, curve = train_lm(tokenizer, phases=PHASES[-1:], minutes=minutes, seed=seed, model=model)
    return save_lm(out, model, curve)


def save_lm(out: Path, model: LlamaForCausalLM, curve: list[dict[str, Any]]) -> dict[str, Any]:
    """Saves and checks a language model; gives its report."""
    save_half(model, out / "lm")
    tokenizer = AutoTokenizer.from_pretrained(out / "lm", trust_remote_code=False)
    accuracy = {name: text_accuracy(model, tokenizer, template=name) for name in ("v1", "v1_sq")}
    return {"curve": curve, "text_accuracy": accuracy}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=BASE)
    parser.add_argument(
        "--minutes", type=float, default=75.0, help="wall-clock budget of all training"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    for part in ("tokenizer", "tower", "lm"):
        parser.add_argument(
            f"--{part}", action="store_true", help=f"make the {part} (default: all three)"
        )
    parser.add_argument(
        "--go-on", action="store_true", help="with --lm: go on from the model that lies there"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    everything = not (args.tokenizer or args.tower or args.lm)
    curves = args.out / "curves.json"
    report = json.loads(curves.read_text()) if curves.exists() else {}
    if args.go_on and (args.tower or args.tokenizer or not args.lm):
        parser.error("--go-on goes with --lm alone")
    if args.tokenizer or everything:
        make_tokenizer(args.out / "lm")
    makers = {"tower": make_tower, "lm": go_on_with_lm if args.go_on else make_lm}
    shares = {"tower": 1 - _LM_SHARE, "lm": _LM_SHARE}
    for part, make in makers.items():
        if getattr(args, part) or everything:
            start = time.monotonic()
            before = report[part] if args.go_on else {"curve": [], "seconds": 0}
            made = make(args.out, args.minutes * (shares[part] if everything else 1.0), args.seed)
            made["curve"] = before["curve"] + made["curve"]
            made["seconds"] = before["seconds"] + round(time.monotonic() - start)
            report[part] = made
            curves.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
