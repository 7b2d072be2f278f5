"""What a trained model knows about scenes it has never seen: answers, questions, and their truth.

    python demo/shapes/evaluate.py --model checkpoints/shapes/stage2 \
        --data checkpoints/shapes/data --output checkpoints/shapes/eval

What is answered goes through the benchmarks' own tasks (VQA, GQA, POPE, captions), on the world's
files in their formats. Writes each task's answers and score, asked.json and figures.json, which
`report.py` shows.
"""

import argparse
import json
import logging
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import world
from PIL import Image
from tqdm import tqdm

import sqllava
from sqllava.ask.questioner import describing
from sqllava.eval.answers import Job, generate
from sqllava.eval.engine import Engine, open_engine
from sqllava.eval.metrics.java import MissingToolError
from sqllava.eval.score import Score, score
from sqllava.eval.tasks import get_task
from sqllava.generation.decoding import Decoding
from sqllava.generation.writer import EncodedImage

logger = logging.getLogger("evaluate")

BATCH = 256
ASKED_SCENES = 100
# Scenes of the POPE and caption files that are tried: all of them would take minutes.
TRIED_SCENES = 100
QUESTIONS_A_SCENE = 8
TEMPERATURE = 1.2
SEED = 0
# Longer than any true one; a model that rambles must not hold the evaluation up.
ANSWER = Decoding(max_new_tokens=12)
DESCRIPTION = Decoding(max_new_tokens=64)
QUESTION = Decoding(24, samples=QUESTIONS_A_SCENE, temperature=TEMPERATURE, top_k=300, top_p=0.95)

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="adapter directory of stage 2")
    parser.add_argument("--data", type=Path, required=True, help="what make_data.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--asked-scenes", type=int, default=ASKED_SCENES)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    figures = evaluate(args.model, args.data / "eval", args.output, args.asked_scenes)
    single = {name: value for name, value in figures.items() if not isinstance(value, dict)}
    logger.info("%s", json.dumps(single, indent=1))


def evaluate(model_path: Path, data: Path, output: Path, asked_scenes: int) -> dict[str, Any]:
    """Asks the model everything, writes what it said, and returns the figures."""
    started = time.monotonic()
    engine = open_engine(str(model_path))
    engine = engine.for_task(engine.processor.conversation_template, "pad")
    plain, shuffled, benchmarks = answer_tasks(engine, data, output)
    scenes = {
        name: world.Scene.from_json(things)
        for name, things in json.loads((data / "scenes.json").read_text()).items()
    }
    questioner = sqllava.SelfQuestioner(engine.model, engine.processor)
    chosen = dict(list(scenes.items())[:asked_scenes])
    images = encode_images(questioner, data / "images", list(chosen))
    asked = ask_about(questioner, images, chosen)
    figures = {
        **figures_of_answers(plain, shuffled),
        **figures_of_asking(asked),
        "benchmarks": benchmarks,
        "scenes": len(scenes),
        "questions": len(plain),
        "asked_scenes": len(asked),
        "evaluation_seconds": round(time.monotonic() - started, 1),
    }
    write_text(output / "asked.json", json.dumps(asked, indent=1))
    write_text(output / "figures.json", json.dumps(figures, indent=1))
    return figures


# --- the benchmarks' tasks ------------------------------------------------------------------------


def answer_tasks(
    engine: Engine, data: Path, output: Path
) -> tuple[list[Row], list[Row], dict[str, float]]:
    """Answers and scores the tasks.

    Returns:
        The VQA rows as answered, the same about other images, and each benchmark's figures.
    """
    rows = read_lines(data / "vqa.jsonl")
    annotations = data / "vqa" / "annotations.json"
    vqa = run_task(engine, "vqav2", data / "vqa.jsonl", annotations, output)
    others = output / "shuffled" / "vqa.jsonl"
    half = rows[::2]
    write_lines(others, with_other_images(half))
    ids = {row["question_id"] for row in half}
    kept = json.loads(annotations.read_text())
    kept["annotations"] = [row for row in kept["annotations"] if row["question_id"] in ids]
    write_text(others.with_name("annotations.json"), json.dumps(kept))
    shuffled = run_task(
        engine,
        "vqav2",
        others,
        others.with_name("annotations.json"),
        others.parent,
        data / "images",
    )
    # GQA's file asks the same questions: they are answered once.
    gqa = score(get_task("gqa"), output / "vqav2.jsonl", data / "gqa")
    pope = try_pope(engine, data, output)
    benchmarks = {
        "VQA accuracy": vqa.metrics["overall"] / 100,
        "GQA accuracy": gqa.metrics["accuracy"] / 100,
        "POPE mean F1": pope.metrics["f1_mean"],
        **try_captions(engine, data, output),
    }
    return judged(rows, vqa), judged(half, shuffled), benchmarks


def run_task(
    engine: Engine,
    name: str,
    questions: Path,
    annotations: Path,
    output: Path,
    images: Path | None = None,
    decoding: Decoding = ANSWER,
) -> Score:
    """Answers a question file and scores the answers, as `sqllava eval run` does."""
    task = get_task(name)
    images = images or questions.parent / "images"
    job = Job(name, questions, images, output / f"{name}.jsonl", decoding)
    generate(engine, job, task.read_questions(questions), batch_size=BATCH, workers=0)
    result = score(task, job.out, annotations, questions)
    write_text(output / f"{name}.score.json", json.dumps(result.as_json(), indent=1))
    return result


def try_pope(engine: Engine, data: Path, output: Path) -> Score:
    """POPE's three lists, about the first scenes."""
    folder = output / "pope"
    for path in (data / "pope").rglob("*.json*"):
        rows = [row for row in read_lines(path) if tried(row["image"])]
        write_lines(folder / path.relative_to(data / "pope"), rows)
    questions = folder / "llava_pope_test.jsonl"
    return run_task(engine, "pope", questions, folder / "coco", output, data / "images")


def try_captions(engine: Engine, data: Path, output: Path) -> dict[str, float]:
    """Captions of the first scenes; nothing without the `eval` extra, which brings Java."""
    folder = output / "captions"
    rows = read_lines(data / "captions" / "questions.jsonl")
    write_lines(folder / "questions.jsonl", [row for row in rows if tried(row["image"])])
    listed = json.loads((data / "captions" / "karpathy_test.json").read_text())
    truth = [row for row in listed if tried(row["image"])]
    write_text(folder / "karpathy_test.json", json.dumps(truth))
    try:
        metrics = run_task(
            engine,
            "coco",
            folder / "questions.jsonl",
            folder / "karpathy_test.json",
            output,
            data / "images",
            DESCRIPTION,
        ).metrics
    except MissingToolError as error:
        logger.warning("captions are not scored: %s", error)
        return {}
    return {"caption CIDEr (of 10)": metrics["cider"], "caption METEOR": metrics["meteor"]}


def tried(image: str) -> bool:
    return int(Path(image).stem) < TRIED_SCENES


def judged(rows: Sequence[Row], result: Score) -> list[Row]:
    """The questions with what was said, and whether the task found it right."""
    items = {item["question_id"]: item for item in result.items}
    return [
        {
            **row,
            "said": items[row["question_id"]]["prediction"],
            "right": items[row["question_id"]]["score"] == 1,
        }
        for row in rows
    ]


# --- asking the model -----------------------------------------------------------------------------


def encode_images(
    questioner: sqllava.SelfQuestioner, folder: Path, names: Sequence[str]
) -> dict[str, EncodedImage]:
    """Encodes each picture once, for all that is asked about it."""
    encoded: dict[str, EncodedImage] = {}
    for batch in batches(names, "pictures"):
        pictures = [Image.open(folder / name).convert("RGB") for name in batch]
        encoded.update(zip(batch, questioner.encode(pictures), strict=True))
    return encoded


def with_other_images(rows: Sequence[Row]) -> list[Row]:
    """The rows with each picture replaced by another: all in random order, each by the next."""
    names = sorted({row["image"] for row in rows})
    if len(names) < 2:
        raise ValueError(f"shuffling needs at least 2 pictures, found {len(names)}")
    random.Random(SEED).shuffle(names)
    other = dict(zip(names, names[1:] + names[:1], strict=True))
    return [{**row, "image": other[row["image"]]} for row in rows]


def ask_about(
    questioner: sqllava.SelfQuestioner,
    images: Mapping[str, EncodedImage],
    scenes: Mapping[str, world.Scene],
) -> list[Row]:
    """What the model says about scenes: a description, questions as drawn, its own answers."""
    asked = []
    for number, batch in enumerate(batches(list(scenes), "questions", BATCH // QUESTIONS_A_SCENE)):
        pictures = [images[name] for name in batch]
        descriptions = questioner.describe_batch(pictures, DESCRIPTION)
        contexts = [describing(text) for text in descriptions]
        questions = questioner.ask_batch(pictures, QUESTION, SEED + number, contexts, redraws=0)
        answers = questioner.answer_batch(
            [picture for picture in pictures for _ in range(QUESTIONS_A_SCENE)],
            [question for several in questions for question in several],
            [context for context in contexts for _ in range(QUESTIONS_A_SCENE)],
            ANSWER,
            asker="vuser",
        )
        answer = iter(answers)
        for name, description, several in zip(batch, descriptions, questions, strict=True):
            checked = [check(question, next(answer), scenes[name]) for question in several]
            truth = world.describe(scenes[name])
            asked.append(
                {"image": name, "description": description, "truth": truth, "questions": checked}
            )
    return asked


def check(question: str, said: str, scene: world.Scene) -> Row:
    """Judges a question of the model's and its answer."""
    found = world.check_question(question, scene)
    return {
        "text": question,
        "said": said,
        "kind": found.kind,
        "well_formed": found.well_formed,
        "grounded": found.grounded,
        "answer": found.answer,
        "right": found.grounded and same(said, found.answer or ""),
    }


def same(said: str, answer: str) -> bool:
    """Whether an answer is exactly the true one, but for case, spaces and a full stop."""
    return " ".join(said.lower().split()).rstrip(".") == answer.lower()


# --- figures --------------------------------------------------------------------------------------


def figures_of_answers(plain: Sequence[Row], shuffled: Sequence[Row]) -> dict[str, Any]:
    """Shares that the VQA task found right: all, on unseen pairs, with other images, by kind."""
    return {
        "vqa_accuracy": accuracy(plain),
        "vqa_accuracy_unseen_pairs": accuracy(row for row in plain if row["unseen_pair"]),
        "vqa_accuracy_shuffled_images": accuracy(shuffled),
        "vqa_by_kind": {
            kind: {
                "questions": len(rows),
                "plain": accuracy(rows),
                "shuffled": accuracy(row for row in shuffled if row["kind"] == kind),
            }
            for kind, rows in by_kind(plain).items()
        },
    }


def figures_of_asking(asked: Sequence[Row]) -> dict[str, Any]:
    """Shares of the questions asked; `self_answer_correct` is a share of the grounded ones, as only
    these have a true answer."""
    questions = [question for scene in asked for question in scene["questions"]]
    grounded = [question for question in questions if question["grounded"]]
    distinct = [len({q["text"] for q in scene["questions"]}) for scene in asked]
    return {
        "ask_well_formed": share(question["well_formed"] for question in questions),
        "ask_grounded": share(question["grounded"] for question in questions),
        "ask_self_answer_correct": share(question["right"] for question in grounded),
        "ask_distinct_of_8": sum(distinct) / max(len(distinct), 1),
        "ask_by_kind": {
            kind: {
                "asked": len(rows),
                "grounded": share(row["grounded"] for row in rows),
                "right": share(row["right"] for row in rows if row["grounded"]),
            }
            for kind, rows in by_kind(questions).items()
        },
    }


def by_kind(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by their kind, in the world's order; what is of no kind is left out."""
    found = defaultdict(list)
    for row in rows:
        found[row["kind"]].append(row)
    return {kind: found[kind] for kind in world.KINDS if kind in found}


def accuracy(rows: Iterable[Row]) -> float | None:
    """Share of rows whose answer is right."""
    return share(row["right"] for row in rows)


def share(values: Iterable[bool]) -> float | None:
    """Share of what is true, None when there is nothing."""
    known = list(values)
    return round(sum(known) / len(known), 4) if known else None


# --- files ----------------------------------------------------------------------------------------


def batches(items: Sequence[Any], what: str, size: int = BATCH) -> Iterator[Sequence[Any]]:
    """Cuts items into batches under a progress bar."""
    with tqdm(total=len(items), desc=what, mininterval=1.0) as bar:
        for start in range(0, len(items), size):
            yield items[start : start + size]
            bar.update(len(items[start : start + size]))


def read_lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, rows: Iterable[Row]) -> None:
    write_text(path, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)


if __name__ == "__main__":
    main()
