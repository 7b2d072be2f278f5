"""Tables of benchmarks: MMBench's TSV, and Excel sheets, as dictionaries of text."""

import csv
import logging
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqllava.eval.fields import Record
from sqllava.eval.records import Row, foreign_content, open_text

logger = logging.getLogger(__name__)

Cells = dict[str, str]
TABLES = (".xlsx", ".tsv", ".csv")
# What XML, and so a sheet, cannot hold; the server's reader takes a space for the end of a word.
_UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_LONGEST = 32_767


def read_table(path: Path, needed: Sequence[str] = ()) -> list[Cells]:
    """Reads a .xlsx, .csv or tab-separated file with a header; an empty cell is "".

    Nothing else counts as missing: a cell may rightly say "None" or "NA". Empty rows at the end,
    as sheets have them, are left out.

    Args:
        needed: the columns without which the table is of no use.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such table, has no rows, or lacks a column.
    """
    rows = list(_sheet_rows(path) if path.suffix == ".xlsx" else _text_rows(path))
    while rows and not any(rows[-1]):
        rows.pop()
    if not rows:
        raise ValueError(f"{path} is empty: expected a header and rows")
    header, *body = rows
    lacking = [name for name in needed if name not in header]
    if lacking:
        raise ValueError(f"{path}: no column {', '.join(lacking)}; its columns are {header}")
    if not body:
        raise ValueError(f"{path} has a header ({', '.join(header)}) and no rows")
    return [dict(zip(header, [*row, *[""] * len(header)], strict=False)) for row in body]


def _text_rows(path: Path) -> Iterator[list[str]]:
    csv.field_size_limit(sys.maxsize)  # cells hold pictures
    with open_text(path, newline="") as file:
        rows = csv.reader(file, delimiter="," if path.suffix == ".csv" else "\t")
        try:
            yield from rows
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.line_num}: not a table ({error})") from None


def _openpyxl() -> Any:
    try:
        import openpyxl
    except ModuleNotFoundError:
        raise ValueError("Excel sheets need openpyxl: pip install 'sqllava[eval]'") from None
    return openpyxl


def _sheet_rows(path: Path) -> Iterator[list[str]]:
    openpyxl = _openpyxl()
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path} is {foreign_content(path) or 'no Excel sheet'}")
        try:
            book = openpyxl.load_workbook(file, read_only=True)
            for row in book.worksheets[0].iter_rows(values_only=True):
                yield ["" if value is None else str(value) for value in row]
        except Exception as error:  # of zip, XML or openpyxl: whatever a broken file leads to
            raise ValueError(f"{path}: not an Excel sheet that can be read ({error!r})") from None


def write_sheet(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes an .xlsx file with one sheet; a text stays a text, also where it begins with "=".

    What a sheet cannot hold, control characters and the end of a very long text, becomes a space or
    is cut off; a warning says of how many texts.
    """
    book = _openpyxl().Workbook()
    sheet = book.worksheets[0]
    sheet.append(list(columns))
    changed = 0
    for number, row in enumerate(rows, 2):
        for column, name in enumerate(columns, 1):
            value = row.get(name, "")
            if value == "":
                continue
            cell = sheet.cell(number, column)
            if isinstance(value, str):
                text = _UNWRITABLE.sub(" ", value)[:_LONGEST]
                changed += text != value
                cell.value = text
                cell.data_type = "s"
            else:
                cell.value = value
    if changed:
        logger.warning(
            "%s: in %d cells control characters became spaces, or a text was cut to %d characters",
            *(path, changed, _LONGEST),
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    book.save(unfinished)
    unfinished.replace(path)


def answers_of_table(path: Path) -> list[Row]:
    """The answers in a submission: its `index` and `prediction` columns."""
    return [
        {
            "question_id": index_of(row, f"{path}, row {number}"),
            "prompt": row.get("question"),
            "text": row["prediction"],
        }
        for number, row in enumerate(read_table(path, ("index", "prediction")), 2)
    ]


def index_of(row: Cells, where: str) -> int:
    """A row's index; tools that know missing cells write it as "2.0".

    Args:
        where: the file and the row, for the error's message.
    """
    index = row["index"]
    return Record({"index": index.removesuffix(".0")}, where).integer("index")
