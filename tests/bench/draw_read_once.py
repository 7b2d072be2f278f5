"""Draws what reading an image once is worth, from what bench_train.py and bench_eval.py printed.

python tests/bench/bench_train.py | tail -n 1 >docs/figures/bench_train.json
python tests/bench/bench_eval.py | tail -n 1 >docs/figures/bench_eval.json
python tests/bench/draw_read_once.py
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"
NAMES = {"rows": "rows", "shared": "rows that share images"}


def training(axes, report: dict) -> None:
    """Records a second against padded rectangles, by records an image."""
    groups = report["records_an_image"]
    for offset, (mode, name) in zip((-0.2, 0.2), NAMES.items(), strict=True):
        places = [number + offset for number in range(len(groups))]
        values = [
            group["against_rectangles"][mode]["records_a_second"] for group in groups.values()
        ]
        axes.bar_label(axes.bar(places, values, 0.36, label=name), fmt="%.2f")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(groups)), [f"{each} an image" for each in groups])
    axes.set(title="Training: records a second, padded rectangles = 1", xlabel="records")
    axes.legend(frameon=False)


def evaluation(axes, report: dict) -> None:
    """Times as fast as batches of questions, by questions a picture."""
    ratios = report["ratios"]
    axes.bar_label(axes.bar(list(ratios), list(ratios.values()), 0.6), fmt="%.1f")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(title="Evaluation: speed, batches of 16 questions = 1", xlabel="questions an image")


def main() -> None:
    reports = {
        name: json.loads((FIGURES / f"bench_{name}.json").read_text()) for name in ("train", "eval")
    }
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    training(left, reports["train"])
    evaluation(right, reports["eval"])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.15)
    figure.savefig(FIGURES / "read_once.svg")


if __name__ == "__main__":
    main()
