"""MMBench and MMBench-CN: multiple choice, asked once for each turn of a question's options."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqllava.eval.fields import Record
from sqllava.eval.metrics.choices import match_mmbench, match_mmbench_2023
from sqllava.eval.pictures import load_cell, picture_bytes
from sqllava.eval.records import (
    Metrics,
    NoAnswersError,
    Question,
    Row,
    by_question_id,
    grouped,
    join,
    percent,
    read_lines,
    text_of,
    write_jsonl,
)
from sqllava.eval.tables import Cells, index_of, read_table, write_sheet
from sqllava.eval.tasks.task import (
    OPTION_LETTER,
    OPTION_LETTER_CN,
    UPLOAD,
    File,
    Inputs,
    Layout,
    Option,
    Task,
    option_lines,
)
from sqllava.pixels import ImageError

# A copy with turned options has the index of its question plus a multiple of this.
TURN = 1_000_000
OPTION_COLUMNS = "ABCD"
# What the upload keeps, in its order; `prediction` is put in.
KEPT = ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
# A shorter cell is the index of the row that holds the picture.
SHORTEST_PICTURE = 64
# What pandas reads as missing, and the published runner with it.
PANDAS_MISSING = frozenset(
    [
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND"),
        *("1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
    ]
)
MATCHING = {"vlmevalkit": match_mmbench, "2023": match_mmbench_2023}

PANDAS_OPTION = Option(
    "--pandas-missing",
    'read options such as "None" and "NA" as missing, as the published runner does',
    False,
)


def options_of(row: Mapping[str, str], pandas_missing: bool = False) -> dict[str, str]:
    """A row's options by letter, up to the first one that is missing."""
    found: dict[str, str] = {}
    for letter in OPTION_COLUMNS:
        text = row.get(letter, "")
        if text == "" or pandas_missing and (text in PANDAS_MISSING or text.lower() == "none"):
            break
        found[letter] = text
    return found


def _question(
    index: int, row: Mapping[str, str], picture: str, suffix: str, pandas_missing: bool
) -> Question:
    options = options_of(row, pandas_missing)
    hint = row.get("hint", "")
    hint = "" if hint.lower() in ("", "nan", "none") else hint + "\n"
    prompt = hint + row["question"] + option_lines(list(options.values()))
    return Question(
        index,
        prompt + suffix,
        prompt=prompt,
        image_base64=picture,
        extra={
            "round_id": 0,
            "options": list(options.values()),
            "option_char": list(options),
        },
    )


def _read(path: Path, suffix: str, pandas_missing: bool = False) -> list[Question]:
    """Reads the TSV, with its pictures in it, or what `prepare` made of it."""
    if path.suffix == ".jsonl":
        return [_prepared(record) for record in read_lines(path)]
    rows = _rows(path, ("index", "question", "image"))
    return [
        _question(index, row, _picture(rows, row["image"]), suffix, pandas_missing)
        for index, row in rows.items()
    ]


def _rows(path: Path, needed: Sequence[str]) -> dict[int, Cells]:
    """A table's rows by index.

    Raises:
        ValueError: a column is missing, or an index is none or there twice; the message says where.
    """
    rows: dict[int, Cells] = {}
    for number, row in enumerate(read_table(path, needed), 2):
        index = index_of(row, f"{path}, row {number}")
        if index in rows:
            raise ValueError(f"{path}, row {number}: index {index} is there twice")
        rows[index] = row
    return rows


def _picture(rows: Mapping[int, Cells], cell: str) -> str:
    """The picture that a cell holds, or that of the row whose index it holds."""
    is_index = len(cell) <= SHORTEST_PICTURE and cell.isascii() and cell.isdecimal()
    if is_index and int(cell) in rows:
        return rows[int(cell)]["image"]
    return cell


def _prepared(record: Record) -> Question:
    return Question(
        record.id("question_id"),
        record.text("text"),
        record.text("image"),
        record.text("prompt"),
        extra={
            "round_id": record.integer("round_id"),
            "options": record.texts("options"),
            "option_char": record.texts("option_char"),
        },
    )


def read_questions(path: Path) -> list[Question]:
    return _read(path, OPTION_LETTER)


def read_questions_cn(path: Path) -> list[Question]:
    return _read(path, OPTION_LETTER_CN)


def judge(inputs: Inputs) -> list[Row]:
    """One item per question: right if all its turns are; `plain` is the first turn alone."""
    rows = _rows(inputs.annotations, ("index", "question"))
    _check_letters(inputs.annotations, rows)
    found = join(inputs.answers, map(str, rows), by_question_id, inputs.allow_missing)
    answers = {int(index): answer for index, answer in found.items()}
    match = MATCHING[inputs.options.get("matching") or "vlmevalkit"]
    pandas_missing = bool(inputs.options.get("pandas_missing"))
    turns: dict[int, list[Row]] = {}
    for index, answer in answers.items():
        row = rows[index]
        said = text_of(answer)
        matched = match(said, options_of(row, pandas_missing))
        turn = {"index": index, "said": said, "matched": matched, "answer": row["answer"]}
        turns.setdefault(index % TURN, []).append(turn)
    return [_item(base, rows, group) for base, group in turns.items()]


def _check_letters(path: Path, rows: Mapping[int, Cells]) -> None:
    """Checks that each row has its right letter; what pandas writes for none is none."""
    for row in rows.values():
        row["answer"] = row.get("answer", "").strip()
    if all(row["answer"] in PANDAS_MISSING for row in rows.values()):
        raise NoAnswersError(
            f"{path} has no public answers: only the benchmark's server can score this split"
        )
    for index, row in rows.items():
        if len(row["answer"]) != 1 or row["answer"] not in OPTION_COLUMNS:
            raise ValueError(
                f"{path}, index {index}: answer must be one of {', '.join(OPTION_COLUMNS)}, "
                f"found {row['answer']!r}"
            )


def _item(base: int, rows: Mapping[int, Cells], turns: list[Row]) -> Row:
    first = next((turn for turn in turns if turn["index"] == base), turns[0])
    row = rows[first["index"]]
    return {
        "question_id": base,
        "prompt": row["question"] + option_lines(list(options_of(row).values())),
        "prediction": first["said"],
        "answer": f"{row['answer']}. {row.get(row['answer'], '')}",
        "score": float(all(turn["matched"] == turn["answer"] for turn in turns)),
        "plain": float(first["matched"] == first["answer"]),
        "turns": turns,
        "category": row.get("category") or None,
        "l2_category": row.get("l2-category") or None,
    }


def summarize(items: Sequence[Row], options: Mapping[str, Any]) -> Metrics:
    """Percentages: circular (papers print it), plain, and circular by category."""
    return {
        "circular_accuracy": percent(items),
        "accuracy": percent(items, "plain"),
        **{
            f"by_{name}": {value: percent(group) for value, group in grouped(items, name)}
            for name in ("l2_category", "category")
        },
    }


def submit(inputs: Inputs, out: Path) -> None:
    """Writes the server's Excel file: the TSV's rows without pictures, with the predictions."""
    table = _rows(inputs.annotations, ("index", "question"))
    found = join(inputs.answers, map(str, table), by_question_id, forgiving=UPLOAD)
    answers = {int(index): answer for index, answer in found.items()}
    rows = [
        {**row, "index": index, "prediction": text_of(answers[index])}
        for index, row in table.items()
    ]
    there = set(rows[0]) | {*OPTION_COLUMNS, "answer", "prediction"}
    write_sheet(out, [name for name in KEPT if name in there], rows)


def _prepare(source: Path, out: Path, options: Mapping[str, Any], suffix: str) -> int:
    """Writes nothing before every picture has been decoded."""
    folder = out.parent / f"{out.stem}_images"
    pictures: dict[str, bytes] = {}
    rows = []
    if source.suffix == ".jsonl":
        raise ValueError(f"{source} is prepared already: expected the benchmark's table")
    for question in _read(source, suffix, bool(options.get("pandas_missing"))):
        name = f"{folder.name}/{int(question.question_id) % TURN}.jpg"
        if name not in pictures:
            try:
                pictures[name] = picture_bytes(question.image_base64 or "")
                load_cell(question.image_base64 or "")
            except ImageError as error:
                raise ValueError(f"{source}, index {question.question_id}: {error}") from None
        rows.append(
            {
                "question_id": question.question_id,
                "image": name,
                "text": question.text,
                "prompt": question.prompt,
                **question.extra,
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in pictures.items():
        (out.parent / name).write_bytes(data)
    write_jsonl(out, rows)
    return len(rows)


def prepare(source: Path, out: Path, options: Mapping[str, Any]) -> int:
    """Makes a question file and a folder of pictures beside it from the TSV."""
    return _prepare(source, out, options, OPTION_LETTER)


def prepare_cn(source: Path, out: Path, options: Mapping[str, Any]) -> int:
    """The same, with the Chinese suffix."""
    return _prepare(source, out, options, OPTION_LETTER_CN)


def _task(name: str, title: str, file: str, suffix: str, **functions: Any) -> Task:
    return Task(
        name=name,
        title=title,
        layout=Layout("mmbench", file, ".", file),
        files=(File(file, "opencompass.org.cn/mmbench (pictures included)", "60 MB"),),
        prompt="[{hint}\\n]{question}\\nA. {option}..." + suffix,
        answers="prompt: the text without the suffix; also round_id, options, option_char",
        metric="circular accuracy: a question counts if all its turns are answered right",
        headline=("circular_accuracy",),
        max_new_tokens=1024,
        judge=judge,
        summarize=summarize,
        submission="Excel sheet: " + ", ".join(KEPT),
        submission_suffix=".xlsx",
        submit=submit,
        options=(
            Option(
                "--matching",
                "how an answer is matched to an option: VLMEvalKit's rule of today or MMBench's of "
                "2023, which lmms-eval keeps",
                "vlmevalkit",
                tuple(MATCHING),
                str,
            ),
            PANDAS_OPTION,
        ),
        prepare_options=(PANDAS_OPTION,),
        **functions,
    )


TASK = _task(
    "mmbench",
    "MMBench (dev)",
    "mmbench_dev_20230712.tsv",
    OPTION_LETTER,
    read_questions=read_questions,
    prepare=prepare,
)
TASK_CN = _task(
    "mmbench_cn",
    "MMBench-CN (dev)",
    "mmbench_dev_cn_20231003.tsv",
    OPTION_LETTER_CN,
    read_questions=read_questions_cn,
    prepare=prepare_cn,
)
