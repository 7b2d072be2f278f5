"""Broken benchmark files: what a reader, a scorer or a writer says of one is a sentence of ours.

Valid files of every task are changed in their structure (keys dropped, renamed, wrapped, of another
type) and in their bytes (cut, turned, in other encodings).
"""

import copy
import gzip
import json
import linecache
import random
import shutil
from pathlib import Path

import pytest
from eval_data import write_all, write_answers
from hypothesis import given, settings
from hypothesis import strategies as st

from sqllava.eval.records import MissingAnswersError, NoAnswersError, write_json, write_jsonl
from sqllava.eval.report import write_report
from sqllava.eval.score import read_answers_file, score
from sqllava.eval.tasks import TASKS
from sqllava.eval.tasks.captions import read_references
from sqllava.eval.tasks.task import Inputs

PACKAGE = Path(__file__).parents[1] / "sqllava"
CAPTIONS = ("coco", "flickr30k", "nocaps", "conceptual")  # their scores need Java
JUDGED = ("llavabench", "mmvet")
OURS = (ValueError, FileNotFoundError, NoAnswersError, MissingAnswersError)
ANNOTATIONS = {
    "vqav2": ("annotations.json", "questions.json"),
    "gqa": ("data/testdev_balanced_questions.json",),
    "vizwiz": ("val.json", "test.json"),
    "scienceqa": ("problems.json", "pid_splits.json"),
    "textvqa": ("TextVQA_0.5.1_val.json", "ocr.json"),
    "pope": ("coco/coco_pope_random.json",),
    "mme": ("MME_Benchmark_release_version/color/0000.txt",),
    "mmbench": ("mmbench_dev_20230712.tsv",),
    "seed": ("SEED-Bench.json",),
    "qbench": ("llvisionqa_dev.json",),
    "coco": ("coco_karpathy_test.json",),
    "nocaps": ("nocaps_val_4500_captions.json",),
    "conceptual": ("question3.jsonl",),
    "mmvet": ("mm-vet.json",),
    "llavabench": (),
}
FOLDERS = {"gqa": "data", "scienceqa": ".", "pope": "coco", "mme": "MME_Benchmark_release_version"}
# Names that other toolkits give, and values of every kind.
NAMES = ["answer", "label", "text", "image", "question_id", "images", "caption", "data", "x", ""]
VALUES = [
    *(None, True, False, 0, -1, 3, 10**30, 1.5, float("nan"), float("inf")),
    *("", "x", "5", " No ", "nan", "\ud800", "\x00", "a\tb\nc", "<image>", [], {}, [None], [[]]),
    *([1, 2], ["a", "b"], {"x": 1}, {"answer": None}, "http://x/y.jpg", "../x"),
]


def places(value, path=()):
    """The paths of all values within a value."""
    yield path
    children = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        children = enumerate(value)
    for key, child in children:
        yield from places(child, (*path, key))


def change(value, rng):
    """A copy with one thing changed."""
    value = copy.deepcopy(value)
    *path, last = ("root", *rng.choice(list(places(value))))
    parent = holder = {"root": value}
    for key in path:
        parent = parent[key]
    how = rng.randrange(8)
    if how == 0:
        del parent[last]
    elif how == 1:
        parent[last] = [parent[last]]
    elif how == 2:
        parent[last] = {str(last): parent[last]}
    elif how == 3 and isinstance(parent, dict):
        parent[rng.choice(NAMES)] = parent.pop(last)
    elif how == 4 and isinstance(parent, list):
        parent.append(parent[last])
    elif how == 5 and isinstance(parent[last], int | float):
        parent[last] = str(parent[last])
    else:
        parent[last] = rng.choice(VALUES)
    return holder.get("root")


def change_bytes(data, rng):
    """Bytes that were cut, turned, or written by another program."""
    place = rng.randrange(len(data) + 1)
    text = data.decode("utf-8", "replace")
    return rng.choice(
        [
            lambda: data[:place],
            lambda: data[:place] + rng.randbytes(3) + data[place:],
            lambda: data[:place] + data[place + rng.randrange(9) :],
            lambda: data.replace(b"\n", b"\r\n"),
            lambda: data.replace(b"\n", b"\r"),
            lambda: data.replace(b"\t", rng.choice([b",", b"\t\t", b' "', b'\t"'])),
            lambda: b"\xef\xbb\xbf" + data,
            lambda: text.encode("utf-16"),
            lambda: text.encode("latin-1", "replace"),
            lambda: gzip.compress(data),
            lambda: data + b"\0" * 9,
            lambda: b"\n\n" + data + b"\n\n",
        ]
    )()


def damage(path, rng):
    """Writes a file anew, with one to three changes."""
    data = path.read_bytes()
    is_json = path.suffix in (".json", ".jsonl")
    for _ in range(rng.randint(1, 3)):
        if not is_json or rng.random() < 0.15:
            data, is_json = change_bytes(data, rng), False
            continue
        text = data.decode("utf-8")
        try:
            value, form = json.loads(text), json.dumps
        except ValueError:
            value = [json.loads(row) for row in text.split("\n") if row]
            form = as_lines
        data = form(change(value, rng)).encode()
    path.write_bytes(data)


def as_lines(value):
    rows = value if isinstance(value, list) else [value]
    return "".join(json.dumps(row) + "\n" for row in rows)


def sentence_of(call):
    """What a call says; an exception that is not ours is a failure.

    Ours are raised by a `raise` of the package, on purpose; others come out of an expression.
    """
    try:
        call()
    except Exception as error:
        place = error.__traceback__
        while place.tb_next:
            place = place.tb_next
        file = place.tb_frame.f_code.co_filename
        statement = linecache.getline(file, place.tb_lineno).strip()
        missing = isinstance(error, FileNotFoundError) and error.filename
        on_purpose = Path(file).is_relative_to(PACKAGE) and statement.startswith("raise ")
        if not (type(error) in OURS and on_purpose or missing):
            raise
        assert str(error) and "\n" not in str(error)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_a_broken_file_leads_to_a_sentence(name, root, tmp_path):
    task, folder = TASKS[name], tmp_path / "data"
    texts = ["A", "Yes.", "red"]
    good = root / task.layout.folder
    answers = write_answers(tmp_path / "a.jsonl", task, good / task.layout.questions, texts)
    kept = [*dict.fromkeys((task.layout.questions, *ANNOTATIONS[name]))]

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(st.integers(0, 2**32))
    def check(seed):
        rng = random.Random(seed)
        shutil.rmtree(folder, ignore_errors=True)
        ignored = shutil.ignore_patterns("*.jpg", "*.png")
        shutil.copytree(good, folder, ignore=ignored)
        said = shutil.copy(answers, folder / "a.jsonl")
        damage(folder / rng.choice([*kept, *kept, "a.jsonl"]), rng)
        for call in calls(task, folder, said, tmp_path / "out"):
            sentence_of(call)

    check()


def calls(task, folder, answers, out):
    """All that reads a task's files."""
    questions = folder / task.layout.questions
    options = {"ocr": folder / "ocr.json"}
    yield lambda: task.read_questions(questions)
    files = [folder / name for name in ANNOTATIONS[task.name]]
    if task.name in FOLDERS:
        files = [folder / FOLDERS[task.name]]
    for file in files:
        for asked in (None, questions):
            if task.name in CAPTIONS:
                yield lambda file=file: read_references(file)
            elif task.name not in JUDGED:
                yield lambda file=file, asked=asked: score(
                    task, answers, file, asked, allow_missing=True, submission=out / "s"
                )
            if task.submit:
                yield lambda file=file, asked=asked: task.submit(
                    Inputs(read_answers_file(answers), file, asked, {}, True), out / "s.xlsx"
                )
        if task.prepare:
            yield lambda file=file: task.prepare(file, out / "q.jsonl", options)


@pytest.mark.parametrize("which", ["pope.score.json", "pope.items.jsonl"])
def test_a_report_of_broken_results_leads_to_a_sentence(which, root, tmp_path):
    task = TASKS["pope"]
    answers = write_answers(tmp_path / "a.jsonl", task, root / "pope/llava_pope_test.jsonl", ["No"])
    result = score(task, answers, root / "pope/coco")
    write_json(tmp_path / "pope.score.json", result.as_json())
    write_jsonl(tmp_path / "pope.items.jsonl", result.items)
    good = (tmp_path / which).read_bytes()

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(st.integers(0, 2**32))
    def check(seed):
        (tmp_path / which).write_bytes(good)
        damage(tmp_path / which, random.Random(seed))
        sentence_of(lambda: write_report(tmp_path, tmp_path, root))

    check()


@pytest.mark.parametrize("suffix", [".xlsx", ".tsv", ".csv", ".jsonl"])
def test_broken_answers_in_every_form_lead_to_a_sentence(suffix, root, tmp_path):
    task = TASKS["mmbench"]
    source = root / "mmbench/mmbench_dev_20230712.tsv"
    answers = write_answers(tmp_path / "a.jsonl", task, source, ["A", "B. cat"])
    if suffix == ".xlsx":
        task.submit(Inputs(read_answers_file(answers), source), tmp_path / "a.xlsx")
    elif suffix != ".jsonl":
        rows = "".join(f"{q.question_id}\tA\n" for q in task.read_questions(source))
        text = f"index\tprediction\n{rows}"
        (tmp_path / "a").with_suffix(suffix).write_text(
            text.replace("\t", "," if suffix == ".csv" else "\t")
        )
    good = (tmp_path / "a").with_suffix(suffix).read_bytes()
    broken = (tmp_path / "b").with_suffix(suffix)

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(st.integers(0, 2**32))
    def check(seed):
        broken.write_bytes(good)
        damage(broken, random.Random(seed))
        sentence_of(lambda: score(task, broken, source, allow_missing=True))

    check()
