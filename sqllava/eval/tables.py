"""Tables of benchmarks: MMBench's TSV, and Excel sheets, as dictionaries of text."""

import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqllava.eval.records import Row


def read_table(path: Path) -> list[dict[str, str]]:
    """Reads a .tsv or .xlsx file with a header; an empty cell is "".

    Nothing else counts as missing: a cell may rightly say "None" or "NA".
    """
    if path.suffix == ".xlsx":
        return _read_sheet(path)
    csv.field_size_limit(sys.maxsize)  # cells hold pictures
    with open(path, encoding="utf-8-sig", newline="") as file:
        return [
            {name: value or "" for name, value in row.items() if name is not None}
            for row in csv.DictReader(file, delimiter="\t")
        ]


def _read_sheet(path: Path) -> list[dict[str, str]]:
    import openpyxl

    book = openpyxl.load_workbook(path, read_only=True)
    try:
        header, *rows = book.worksheets[0].iter_rows(values_only=True)
    finally:
        book.close()
    names = [str(name) for name in header]
    return [
        {name: "" if value is None else str(value) for name, value in zip(names, row, strict=False)}
        for row in rows
    ]


def write_sheet(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes an .xlsx file with one sheet; a text stays a text, also where it begins with "="."""
    import openpyxl

    book = openpyxl.Workbook()
    sheet = book.worksheets[0]
    sheet.append(list(columns))
    for number, row in enumerate(rows, 2):
        for column, name in enumerate(columns, 1):
            value = row.get(name, "")
            if value == "":
                continue
            cell = sheet.cell(number, column)
            cell.value = value
            if isinstance(value, str):
                cell.data_type = "s"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    book.save(unfinished)
    unfinished.replace(path)


def answers_of_sheet(path: Path) -> list[Row]:
    """The answers in a submission: its `index` and `prediction` columns."""
    return [
        {"question_id": int(row["index"]), "prompt": row.get("question"), "text": row["prediction"]}
        for row in read_table(path)
    ]
