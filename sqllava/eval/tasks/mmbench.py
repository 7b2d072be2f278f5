"""MMBench and MMBench-CN: multiple choice, asked once for each turn of a question's options."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqllava.eval.metrics.choices import match_mmbench, match_mmbench_2023
from sqllava.eval.records import (
    Metrics,
    NoAnswersError,
    Question,
    Row,
    by_question_id,
    grouped,
    join,
    percent,
    read_jsonl,
    text_of,
    write_jsonl,
)
from sqllava.eval.tables import read_table, write_sheet
from sqllava.eval.tasks.task import (
    OPTION_LETTER,
    OPTION_LETTER_CN,
    File,
    Inputs,
    Layout,
    Option,
    Task,
    option_lines,
)

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


def _question(row: Mapping[str, str], suffix: str, pandas_missing: bool) -> Question:
    options = options_of(row, pandas_missing)
    hint = row.get("hint", "")
    hint = "" if hint.lower() in ("", "nan", "none") else hint + "\n"
    prompt = hint + row["question"] + option_lines(list(options.values()))
    return Question(
        int(row["index"]),
        prompt + suffix,
        prompt=prompt,
        image_base64=row.get("image"),
        extra={
            "round_id": 0,
            "options": list(options.values()),
            "option_char": list(options),
        },
    )


def _read(path: Path, suffix: str, pandas_missing: bool = False) -> list[Question]:
    """Reads the TSV, with its pictures in it, or what `prepare` made of it."""
    if path.suffix == ".jsonl":
        return [_prepared(row) for row in read_jsonl(path)]
    rows = read_table(path)
    pictures = {row["index"]: row.get("image", "") for row in rows}
    for row in rows:
        if 0 < len(pictures[row["index"]]) <= SHORTEST_PICTURE:
            row["image"] = pictures[row["image"]]
    return [_question(row, suffix, pandas_missing) for row in rows]


def _prepared(row: Row) -> Question:
    extra = {name: row[name] for name in ("round_id", "options", "option_char")}
    return Question(row["question_id"], row["text"], row["image"], row["prompt"], extra=extra)


def read_questions(path: Path) -> list[Question]:
    return _read(path, OPTION_LETTER)


def read_questions_cn(path: Path) -> list[Question]:
    return _read(path, OPTION_LETTER_CN)


def judge(inputs: Inputs) -> list[Row]:
    """One item per question: right if all its turns are; `plain` is the first turn alone."""
    table = read_table(inputs.annotations)
    if not any(row.get("answer") for row in table):
        raise NoAnswersError(f"{inputs.annotations} has no answers: it is a test split")
    rows = {row["index"]: row for row in table}
    answers = join(
        inputs.answers, [row["index"] for row in table], by_question_id, inputs.allow_missing
    )
    match = MATCHING[inputs.options.get("matching") or "vlmevalkit"]
    pandas_missing = bool(inputs.options.get("pandas_missing"))
    turns: dict[int, list[Row]] = {}
    for index, answer in answers.items():
        row = rows[index]
        said = text_of(answer)
        matched = match(said, options_of(row, pandas_missing))
        turn = {"index": int(index), "said": said, "matched": matched, "answer": row["answer"]}
        turns.setdefault(int(index) % TURN, []).append(turn)
    return [_item(base, rows, group) for base, group in turns.items()]


def _item(base: int, rows: Mapping[str, Mapping[str, str]], turns: list[Row]) -> Row:
    first = next((turn for turn in turns if turn["index"] == base), turns[0])
    row = rows[str(first["index"])]
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
    table = read_table(inputs.annotations)
    answers = join(inputs.answers, [row["index"] for row in table], by_question_id)
    rows = [
        {**row, "index": int(row["index"]), "prediction": text_of(answers[row["index"]])}
        for row in table
    ]
    there = set(table[0]) | {*OPTION_COLUMNS, "answer", "prediction"}
    write_sheet(out, [name for name in KEPT if name in there], rows)


def _prepare(source: Path, out: Path, options: Mapping[str, Any], suffix: str) -> int:
    folder = out.parent / f"{out.stem}_images"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for question in _read(source, suffix, bool(options.get("pandas_missing"))):
        name = f"{folder.name}/{int(question.question_id) % TURN}.jpg"
        (out.parent / name).write_bytes(base64.b64decode(question.image_base64 or ""))
        rows.append(
            {
                "question_id": question.question_id,
                "image": name,
                "text": question.text,
                "prompt": question.prompt,
                **question.extra,
            }
        )
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
