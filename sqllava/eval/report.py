"""One report over a folder of scores: a table beside published figures, and a page of examples.

Reads <task>.score.json and <task>.items.jsonl as `run` writes them; writes report.json, report.md
and report.html, which holds its pictures.
"""

import base64
import html
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqllava.data.images import load_image, resolve_image
from sqllava.eval.fields import Record
from sqllava.eval.records import Row, read_json, read_lines, to_json, write_json, write_text
from sqllava.eval.score import headline
from sqllava.eval.tasks import TASKS
from sqllava.eval.tasks.published import PUBLISHED
from sqllava.eval.tasks.task import Task
from sqllava.pixels import ImageError

logger = logging.getLogger(__name__)

COLUMNS = ("SQ-LLaVA-7B", "SQ-LLaVA-13B", "LLaVA-1.5-7B", "LLaVA-1.5-13B")
EXAMPLES = 12
THUMBNAIL = 256
LEFT_OUT = ("missing", "failed", "failed_images")
TEMPLATE = Path(__file__).with_name("report.html")


def write_report(results: Path, out: Path, data: Path | None = None) -> str:
    """Writes the report.

    Args:
        results: the folder of scores.
        out: the folder to write into.
        data: the data folder, for pictures of runs that recorded no image folder.

    Returns:
        The table as Markdown.

    Raises:
        FileNotFoundError: there are no scores.
        ValueError: a file is none of `score`; the message says which.
    """
    scores = {
        name: read_score(TASKS[name], results / f"{name}.score.json")
        for name in TASKS
        if (results / f"{name}.score.json").is_file()
    }
    if not scores:
        raise FileNotFoundError(f"{results} holds no <task>.score.json: `sqllava eval run` them")
    rows = [_row(TASKS[name], score) for name, score in scores.items()]
    table = _markdown(rows)
    sections = [
        _section(TASKS[name], score, results / f"{name}.items.jsonl", data)
        for name, score in scores.items()
    ]
    page = TEMPLATE.read_text(encoding="utf-8")
    page = page.replace("{{table}}", _html_table(rows)).replace("{{tasks}}", "".join(sections))
    write_json(out / "report.json", {"table": rows, "scores": scores})
    write_text(out / "report.md", table)
    write_text(out / "report.html", page)
    return table


def read_score(task: Task, path: Path) -> Row:
    """A score's file, as `score --out` and `run` write it.

    Raises:
        ValueError: it has no metrics, counts and settings, or its figure is no number.
    """
    content = read_json(path)
    score = Record(content if isinstance(content, dict) else {}, str(path))
    for name in ("metrics", "counts", "settings"):
        if not isinstance(score.row.get(name), dict):
            raise ValueError(f"{path}: a score needs an object {name}: `sqllava eval score --out`")
    counts = score.record("counts")
    for name in LEFT_OUT:
        if counts.row.get(name) is not None:
            counts.integer(name)
    *parts, last = task.headline
    metrics = score.record("metrics")
    for part in parts:
        metrics = metrics.record(part) if part in metrics.row else Record({}, metrics.where)
    if not isinstance(metrics.row.get(last) or 0.0, int | float):
        raise metrics.wrong(last, "a number")
    return score.row


def _read_items(path: Path) -> list[Row]:
    """Items as `run` and `score` write them; ValueError names one of another form."""
    records = read_lines(path)
    for record in records:
        if not isinstance(record.row.get("score") or 0.0, int | float):
            raise record.wrong("score", "a number")
    return [{**record.row, "image": record.optional_text("image")} for record in records]


def _run_of(score: Row) -> Row:
    """What the run recorded that made the answers; nothing for answers from elsewhere."""
    run = score["settings"].get("run")
    return run if isinstance(run, dict) else {}


def _left_out(counts: Row) -> int:
    """How many items have no part in the figure, or stand in it as no answer."""
    return sum(int(counts.get(name) or 0) for name in LEFT_OUT)


def _row(task: Task, score: Row) -> Row:
    published = PUBLISHED.get(task.name, {})
    return {
        "task": task.name,
        "title": task.title,
        "metric": "/".join(task.headline) + " %" * (task.scale == 100),
        "model": _run_of(score).get("model_id"),
        "ours": headline(task, score["metrics"]),
        "items": score["counts"].get("items"),
        "left_out": _left_out(score["counts"]),
        **{name: published.get(name) for name in COLUMNS},
    }


def _cells(row: Row) -> list[str]:
    figures = (row[name] for name in ("ours", *COLUMNS))
    shown = ["" if value is None else f"{value:.1f}" for value in figures]
    items = str(row["items"] or "") + f" ({row['left_out']} without)" * bool(row["left_out"])
    return [row["title"], row["metric"], *shown, items]


HEADINGS = ("benchmark", "figure", "ours", *COLUMNS, "items")


def _markdown(rows: Sequence[Row]) -> str:
    lines = [HEADINGS, ("---",) * len(HEADINGS), *(_cells(row) for row in rows)]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def _html_table(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in HEADINGS)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


# --- examples -------------------------------------------------------------------------------------


def _section(task: Task, score: Row, items: Path, data: Path | None) -> str:
    """A task's part of the page: its figures, its settings and examples."""
    folder = _run_of(score).get("images")
    own = data and data / task.layout.folder / task.layout.images
    images = Path(str(folder)) if folder else own
    shown = examples(_read_items(items)) if items.is_file() else []
    cards = "".join(_card(item, images) for item in shown)
    numbers, settings = to_json(score["metrics"]), to_json(score["settings"])
    return (
        f'<section id="{task.name}"><h2>{html.escape(task.title)}</h2>'
        f"<p>{html.escape(task.metric)}</p>"
        f"<details><summary>all figures</summary><pre>{html.escape(numbers)}</pre></details>"
        f"<details><summary>settings</summary><pre>{html.escape(settings)}</pre></details>"
        f'<div class="cards">{cards}</div></section>\n'
    )


def examples(items: Sequence[Row], count: int = EXAMPLES) -> list[Row]:
    """A few items spread over the file, wrong ones and right ones by turns."""
    right = [item for item in items if _is_right(item)]
    wrong = [item for item in items if not _is_right(item)]
    half = count // 2
    taken = [_spread(wrong, max(half, count - len(right))), _spread(right, half)]
    longest = max(map(len, taken))
    return [group[i] for i in range(longest) for group in taken if i < len(group)][:count]


def _is_right(item: Row) -> bool:
    return (item.get("score") or 0) > 0.5


def _spread(items: Sequence[Row], count: int) -> list[Row]:
    step = max(1, len(items) // max(count, 1))
    return list(items[::step][:count])


def _card(item: Row, images: Path | None) -> str:
    answers = item.get("answers") or item.get("answer") or ""
    several = answers if isinstance(answers, list) else [answers]
    truth = " | ".join(dict.fromkeys(map(str, several)))
    said = item.get("said", item.get("prediction")) or "(nothing)"
    verdict = "right" if _is_right(item) else "wrong"
    if item.get("score") is None:
        verdict = "open"
    return (
        f'<figure class="{verdict}">{_picture(item, images)}<figcaption>'
        f"<p>{html.escape(str(item.get('prompt') or ''))}</p>"
        f'<p class="said">{html.escape(str(said))}</p>'
        f'<p class="truth">{html.escape(truth)}</p></figcaption></figure>'
    )


def _picture(item: Mapping[str, Any], images: Path | None) -> str:
    """A thumbnail, held in the page; a word where there is no picture."""
    if not item.get("image") or images is None:
        return '<div class="none">no picture</div>'
    try:
        picture = load_image(resolve_image(images, item["image"]))
    except ImageError:
        return '<div class="none">picture not found</div>'
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=80)
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{encoded}">'
