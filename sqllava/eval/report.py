"""One report over a folder of scores: a table beside published figures, and a page of examples.

Reads <task>.score.json and <task>.items.jsonl as `run` writes them; writes report.json, report.md
and report.html, which holds its pictures.
"""

import base64
import html
import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqllava.data.images import ImageError, load_image, resolve_image
from sqllava.eval.records import Row, read_json, read_jsonl, write_json, write_text
from sqllava.eval.score import headline
from sqllava.eval.tasks import TASKS
from sqllava.eval.tasks.published import PUBLISHED
from sqllava.eval.tasks.task import Task

logger = logging.getLogger(__name__)

COLUMNS = ("SQ-LLaVA-7B", "SQ-LLaVA-13B", "LLaVA-1.5-7B", "LLaVA-1.5-13B")
EXAMPLES = 12
THUMBNAIL = 256
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
    """
    scores = {
        name: read_json(results / f"{name}.score.json")
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


def _row(task: Task, score: Row) -> Row:
    published = PUBLISHED.get(task.name, {})
    return {
        "task": task.name,
        "title": task.title,
        "metric": "/".join(task.headline) + " %" * (task.scale == 100),
        "model": score["settings"]["run"].get("model_id"),
        "ours": headline(task, score["metrics"]),
        "items": score["counts"].get("items"),
        **{name: published.get(name) for name in COLUMNS},
    }


def _cells(row: Row) -> list[str]:
    figures = (row[name] for name in ("ours", *COLUMNS))
    shown = ["" if value is None else f"{value:.1f}" for value in figures]
    return [row["title"], row["metric"], *shown, str(row["items"] or "")]


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
    folder = score["settings"]["run"].get("images")
    images = Path(folder) if folder else data and data / task.layout.folder / task.layout.images
    shown = examples(read_jsonl(items)) if items.is_file() else []
    cards = "".join(_card(item, images) for item in shown)
    numbers = json.dumps(score["metrics"], indent=1, ensure_ascii=False)
    settings = json.dumps(score["settings"], indent=1, ensure_ascii=False)
    return (
        f'<section id="{task.name}"><h2>{html.escape(task.title)}</h2>'
        f"<p>{html.escape(task.metric)}</p>"
        f"<details><summary>all figures</summary><pre>{html.escape(numbers)}</pre></details>"
        f"<details><summary>settings</summary><pre>{html.escape(settings)}</pre></details>"
        f'<div class="cards">{cards}</div></section>\n'
    )


def examples(items: Sequence[Row], count: int = EXAMPLES) -> list[Row]:
    """A few items spread over the file, wrong ones and right ones by turns."""
    right = [item for item in items if item.get("score", 0) > 0.5]
    wrong = [item for item in items if item.get("score", 0) <= 0.5]
    half = count // 2
    taken = [_spread(wrong, max(half, count - len(right))), _spread(right, half)]
    longest = max(map(len, taken))
    return [group[i] for i in range(longest) for group in taken if i < len(group)][:count]


def _spread(items: Sequence[Row], count: int) -> list[Row]:
    step = max(1, len(items) // max(count, 1))
    return list(items[::step][:count])


def _card(item: Row, images: Path | None) -> str:
    answers = item.get("answers") or item.get("answer") or ""
    truth = " | ".join(dict.fromkeys(answers)) if isinstance(answers, list) else str(answers)
    said = item.get("said", item.get("prediction")) or "(nothing)"
    verdict = "right" if item.get("score", 0) > 0.5 else "wrong"
    if "score" not in item:
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
