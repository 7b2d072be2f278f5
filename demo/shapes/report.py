"""The quickstart's report: one page with the figures, pictures, and what the model said of them.

    python demo/shapes/report.py --run checkpoints/shapes --output checkpoints/shapes/report

Reads what `evaluate.py` and both stages left in the run's folder; writes index.html, which holds
everything it shows, and figures.json.
"""

import argparse
import base64
import html
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from evaluate import write_text

PICTURES = 24
STAGES = (("stage1", "Stage 1: alignment"), ("stage2", "Stage 2: self-questioning"))
# Name in figures.json, label, what counts as passed (None: nothing does), what it means.
FIGURES = (
    ("vqa_accuracy", "answers right", 0.85, "exact match on scenes never seen"),
    ("vqa_accuracy_unseen_pairs", "on unseen pairs", 0.70, "color and shape never seen together"),
    ("vqa_accuracy_shuffled_images", "with other images", None, "what can be guessed blindly"),
    ("ask_well_formed", "questions well-formed", 0.95, "of 8 asked about each picture"),
    ("ask_grounded", "questions grounded", 0.90, "they are about what is there"),
    ("ask_self_answer_correct", "own answers right", 0.80, "to its own grounded questions"),
    ("ask_distinct_of_8", "distinct of 8", 5.0, "different questions per picture"),
)
COUNT = "ask_distinct_of_8"  # not a share, as the others are
TEMPLATE = Path(__file__).with_name("report.html")

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="folder with data/, stage1/, stage2/ and eval/")
    parser.add_argument("--output", type=Path, required=True, help="folder for the report")
    parser.add_argument("--seconds", type=int, help="what the whole run took")
    parser.add_argument("--print", action="store_true", help="only print a report's figures")
    args = parser.parse_args()
    if not args.print:
        write_report(args.run, args.output, args.seconds)
    sys.stdout.write(summary(json.loads((args.output / "figures.json").read_text())))


def write_report(run: Path, output: Path, seconds: int | None = None) -> None:
    """Writes the report of a run.

    Raises:
        FileNotFoundError: a step of the run has left nothing; the name of the file says which.
    """
    figures = json.loads((run / "eval" / "figures.json").read_text())
    if seconds is not None:
        figures = {"seconds": seconds, **figures}
    asked = json.loads((run / "eval" / "asked.json").read_text())
    curves = [(title, losses(run / name / "trainer_state.json")) for name, title in STAGES]
    page = TEMPLATE.read_text()
    parts = {
        "lead": lead(figures),
        "figures": figure_cards(figures),
        "answers": answer_table(figures["vqa_by_kind"]),
        "benchmarks": benchmark_table(figures.get("benchmarks", {})),
        "asking": asking_table(figures["ask_by_kind"]),
        "curves": "".join(curve_figure(title, points) for title, points in curves),
        "pictures": "".join(
            picture_card(row, run / "data" / "eval" / "images") for row in asked[:PICTURES]
        ),
        "gallery": gallery(asked[PICTURES:], run / "data" / "eval" / "images"),
    }
    for name, part in parts.items():
        page = page.replace(f"{{{{{name}}}}}", part)
    write_text(output / "index.html", page)
    write_text(output / "figures.json", json.dumps(figures, indent=1))


def losses(trainer_state: Path) -> list[tuple[int, float]]:
    """(step, loss) of a run's log."""
    history = json.loads(trainer_state.read_text())["log_history"]
    return [(entry["step"], float(entry["loss"])) for entry in history if "loss" in entry]


# --- figures --------------------------------------------------------------------------------------


def shown(name: str, value: float | None) -> str:
    """A figure for people: a share in per cent, a mean with one decimal."""
    if value is None:
        return "–"
    return f"{value:.1f}" if name == COUNT else f"{100 * value:.1f} %"


def summary(figures: Row) -> str:
    """The figures as lines of text."""
    lines = [f"  {label:24}{shown(name, figures[name]):>8}" for name, label, *_ in FIGURES]
    if figures.get("seconds"):
        lines.append(f"  {'time':24}{minutes(figures['seconds']):>8}")
    return "\n".join(lines) + "\n"


def minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def lead(figures: Row) -> str:
    """What it was tried on."""
    return (
        f"Tried with {figures['questions']:,} questions about {figures['scenes']:,} scenes that it "
        f"has never seen, and by asking about {figures['asked_scenes']} of these."
    )


def figure_cards(figures: Row) -> str:
    """The figures, each with whether it reaches what the project asks for."""
    cards = []
    for name, label, floor, meaning in FIGURES:
        value = figures[name]
        state = "" if floor is None or value is None else " ok" if value >= floor else " low"
        if floor is None:
            goal = "the lower, the better"
        else:
            goal = f"goal: {floor:g} or more" if name == COUNT else f"goal: {floor:.0%} or more"
        cards.append(card(shown(name, value), label, meaning, goal, state))
    if figures.get("seconds"):
        cards.append(card(minutes(figures["seconds"]), "minutes", "from data to report", ""))
    return "".join(cards)


def card(value: str, label: str, meaning: str, goal: str, state: str = "") -> str:
    return (
        f'<div class="card{state}"><b>{value}</b><span>{label}</span>'
        f"<small>{meaning}<br>{goal}</small></div>"
    )


def bar(value: float | None, kind: str = "") -> str:
    """A table cell with a share and its bar."""
    length = f'<i style="--share:{value or 0:.3f}"></i>'
    return f'<td class="bar {kind}">{length}<em>{shown("", value)}</em></td>'


def answer_table(by_kind: Row) -> str:
    """Exact match of each kind, beside what it is with other images."""
    rows = "".join(
        f"<tr><th>{kind}</th><td class=n>{row['questions']}</td>{bar(row['plain'])}"
        f"{bar(row['shuffled'], 'dim')}</tr>"
        for kind, row in by_kind.items()
    )
    head = "<tr><th>kind</th><th class=n>asked</th><th>right</th><th>with other images</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def benchmark_table(figures: Row) -> str:
    """What the benchmarks' own tasks found."""
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td class=n>{value:.3f}</td></tr>"
        for name, value in figures.items()
    )
    return f"<table><tbody>{rows}</tbody></table>"


def asking_table(by_kind: Row) -> str:
    """What the model asked, by kind."""
    rows = "".join(
        f"<tr><th>{kind}</th><td class=n>{row['asked']}</td>{bar(row['grounded'])}"
        f"{bar(row['right'])}</tr>"
        for kind, row in by_kind.items()
    )
    head = "<tr><th>kind</th><th class=n>asked</th><th>grounded</th><th>own answer right</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


# --- pictures -------------------------------------------------------------------------------------


def data_url(image: Path) -> str:
    """A picture as text, so that the page needs no other file."""
    return "data:image/jpeg;base64," + base64.b64encode(image.read_bytes()).decode()


def picture_card(row: Row, folder: Path) -> str:
    """A picture with what the model said about it."""
    right = row["description"] == row["truth"]
    asked = "".join(question_line(question) for question in distinct(row["questions"]))
    truth = "" if right else f'<p class="truth">{html.escape(row["truth"])}</p>'
    return (
        f'<article><img src="{data_url(folder / row["image"])}" alt="{html.escape(row["truth"])}">'
        f"<div><p>{mark(right)}{html.escape(row['description'])}</p>{truth}<ul>{asked}</ul></div>"
        "</article>"
    )


def distinct(questions: Sequence[Row]) -> list[Row]:
    """The questions without repeats."""
    return list({question["text"]: question for question in questions}.values())


def question_line(question: Row) -> str:
    """A question of the model's, its answer, and what is wrong with either."""
    text, said = html.escape(question["text"]), html.escape(question["said"])
    if not question["well_formed"]:
        return f'<li class="odd">{text} <s>not a question of this world</s></li>'
    if not question["grounded"]:
        return f'<li class="odd">{text} <b>{said}</b> <s>not about this picture</s></li>'
    truth = "" if question["right"] else f" <s>it is {html.escape(question['answer'])}</s>"
    return f"<li>{mark(question['right'])}{text} <b>{said}</b>{truth}</li>"


def mark(right: bool) -> str:
    return '<i class="yes">✓</i>' if right else '<i class="no">✗</i>'


def gallery(asked: Iterable[Row], folder: Path) -> str:
    """The other pictures, small, with how many of the model's own answers are right."""
    tiles = []
    for row in asked:
        known = [question for question in row["questions"] if question["grounded"]]
        right = sum(question["right"] for question in known)
        title = html.escape(f"{row['description']} ({right} of {len(known)} own answers right)")
        tiles.append(
            f'<figure title="{title}"><img src="{data_url(folder / row["image"])}" alt="">'
            f"<figcaption>{right}/{len(known)}</figcaption></figure>"
        )
    return "".join(tiles)


# --- curves ---------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 460, 220, 38, 24, 10


def curve_figure(title: str, points: Sequence[tuple[int, float]]) -> str:
    """A loss curve as SVG."""
    if len(points) < 2:
        return f"<figure><figcaption>{title}: too few points for a curve</figcaption></figure>"
    last = points[-1][0]
    top = nice_step(max(loss for _, loss in points)) * 4

    def place(step: float, loss: float) -> str:
        x = LEFT + (WIDTH - LEFT - 6) * step / last
        y = TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(loss, top) / top)
        return f"{x:.1f},{y:.1f}"

    grid = ""
    for quarter in range(5):
        step, loss = nice_step(last) * quarter, top * quarter / 4
        y = place(0, loss).split(",")[1]
        grid += f'<line x1="{LEFT}" x2="{WIDTH - 6}" y1="{y}" y2="{y}"/>'
        grid += f'<text x="{LEFT - 6}" y="{y}" dy="4" text-anchor="end">{loss:g}</text>'
        if step <= last:
            x = place(step, 0).split(",")[0]
            anchor = "end" if step == last else "middle"
            grid += f'<text x="{x}" y="{HEIGHT - 6}" text-anchor="{anchor}">{step:,.0f}</text>'
    raw = " ".join(place(*point) for point in points)
    smooth = " ".join(place(*point) for point in smoothed(points))
    return (
        f"<figure><figcaption>{title} <span>loss {points[0][1]:.2f} → {points[-1][1]:.2f}</span>"
        f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss by step">'
        f'<g class="grid">{grid}</g><polyline class="raw" points="{raw}"/>'
        f'<polyline class="smooth" points="{smooth}"/></svg></figure>'
    )


def nice_step(highest: float) -> float:
    """The smallest round number of which four reach the highest."""
    steps = [factor * 10.0**power for power in range(-4, 5) for factor in (1, 1.5, 2, 2.5, 5)]
    return next(step for step in steps if 4 * step >= highest)


def smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """A running mean over a twentieth of the run."""
    half = max(1, len(points) // 40)
    result = []
    for number, (step, _) in enumerate(points):
        near = points[max(0, number - half) : number + half + 1]
        result.append((step, sum(loss for _, loss in near) / len(near)))
    return result


if __name__ == "__main__":
    main()
