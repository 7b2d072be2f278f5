"""What a trained model knows about scenes it has never seen: answers, questions, and their truth.

    python demo/shapes/evaluate.py --model checkpoints/shapes/stage2 \
        --data checkpoints/shapes/data --output checkpoints/shapes/eval

Writes answers.jsonl and answers_shuffled.jsonl (the field's format), asked.json and figures.json,
which `report.py` shows.
"""

import argparse
import json
import logging
import random
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import world
from PIL import Image
from tqdm import tqdm

import sqllava
from sqllava.ask import Decoding, EncodedImage, describing

logger = logging.getLogger("evaluate")

BATCH = 256
ASKED_SCENES = 100
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
    model, processor = sqllava.load(model_path)
    questioner = sqllava.SelfQuestioner(model, processor)
    rows = read_lines(data / "vqa.jsonl")
    scenes = {
        name: world.Scene.from_json(things)
        for name, things in json.loads((data / "scenes.json").read_text()).items()
    }
    images = encode_images(questioner, data / "images", sorted(scenes))
    plain = answer_rows(questioner, images, rows)
    shuffled = answer_rows(questioner, images, with_other_images(rows))
    asked = ask_about(questioner, images, dict(list(scenes.items())[:asked_scenes]))
    figures = {
        **figures_of_answers(plain, shuffled),
        **figures_of_asking(asked),
        "scenes": len(scenes),
        "questions": len(rows),
        "asked_scenes": len(asked),
        "evaluation_seconds": round(time.monotonic() - started, 1),
    }
    model_id = f"{model_path.parent.name}/{model_path.name}"
    write_lines(output / "answers.jsonl", answer_lines(plain, model_id))
    write_lines(output / "answers_shuffled.jsonl", answer_lines(shuffled, model_id))
    write_text(output / "asked.json", json.dumps(asked, indent=1))
    write_text(output / "figures.json", json.dumps(figures, indent=1))
    return figures


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


def answer_rows(
    questioner: sqllava.SelfQuestioner, images: Mapping[str, EncodedImage], rows: Sequence[Row]
) -> list[Row]:
    """The rows with the model's answer as `said`, in the order of `question_id`."""
    answered = []
    for batch in batches(sorted(rows, key=lambda row: len(row["text"])), "answers"):
        said = questioner.answer_batch(
            [images[row["image"]] for row in batch], [row["text"] for row in batch], decoding=ANSWER
        )
        answered += [{**row, "said": text} for row, text in zip(batch, said, strict=True)]
    return sorted(answered, key=lambda row: row["question_id"])


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
    """Exact match: overall, on unseen pairs, with other images, and each kind's."""
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
    return share(same(row["said"], row["answer"]) for row in rows)


def share(values: Iterable[bool]) -> float | None:
    """Share of what is true, None when there is nothing."""
    known = list(values)
    return round(sum(known) / len(known), 4) if known else None


# --- files ----------------------------------------------------------------------------------------


def answer_lines(rows: Sequence[Row], model_id: str) -> Iterator[Row]:
    """Rows in the form that the field's scripts read."""
    for row in rows:
        address = f"{model_id}/{row['question_id']}/{row['image']}"
        yield {
            "question_id": row["question_id"],
            "prompt": row["text"],
            "text": row["said"],
            "answer_id": uuid.uuid5(uuid.NAMESPACE_URL, address).hex,
            "model_id": model_id,
            "metadata": {name: row[name] for name in ("image", "kind", "unseen_pair", "answer")},
        }


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
