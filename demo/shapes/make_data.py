"""Writes the miniature world's data: training records and evaluation files in the real formats.

python demo/shapes/make_data.py --out data/shapes
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections import Counter
from collections.abc import Iterable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import world
from tqdm import tqdm

logger = logging.getLogger(__name__)

DESCRIBE_FIRST = 0.35
TEXT_ONLY = 0.07
TURNS = (8, 10)
QUESTIONS_A_SCENE = 3
ANSWERS_A_QUESTION = 10  # Ten people answer each VQA question; here they agree.

Record = dict[str, Any]
Drawing = tuple[Path, world.Scene, str]


def make_data(out: Path, pretrain: int, finetune: int, evaluation: int, seed: int) -> None:
    """Writes everything; equal arguments give equal files.

    Args:
        out: The folder to write `mixTraindata/` and `eval/` into.
        pretrain: How many stage-1 captions.
        finetune: How many stage-2 conversations.
        evaluation: How many evaluation scenes, every second with an unseen pair.
        seed: Of everything.
    """
    training = out / "mixTraindata"
    captions, first = pretrain_records(pretrain, f"{seed}/pretrain")
    dialogues, second = finetune_records(finetune, f"{seed}/finetune")
    scenes = evaluation_scenes(evaluation, f"{seed}/eval")
    names = {name: out / "eval" / "images" / name for name in scenes}
    drawings = [
        (training / name, scene, f"{seed}/{name}") for name, scene in {**first, **second}.items()
    ]
    drawings += [(path, scenes[name], f"{seed}/eval/{name}") for name, path in names.items()]
    draw(drawings)
    write_json(training / "shapes_pretrain.json", captions)
    write_json(training / "shapes_finetune.json", dialogues)
    write_evaluation(out / "eval", scenes, f"{seed}/questions")


def draw(drawings: list[Drawing]) -> None:
    """Renders all scenes to JPEG files in two processes."""
    for folder in {path.parent for path, _, _ in drawings}:
        folder.mkdir(parents=True, exist_ok=True)
    with get_context("spawn").Pool(2) as workers:
        done = workers.imap_unordered(_draw, drawings, chunksize=64)
        for _ in tqdm(done, total=len(drawings), desc="pictures", mininterval=1.0):
            pass


def _draw(drawing: Drawing) -> None:
    path, scene, seed = drawing
    world.render(scene, random.Random(seed)).save(path, "JPEG", quality=world.JPEG_QUALITY)


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_lines(path: Path, values: Iterable[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


# --- training -------------------------------------------------------------------------------------


def pretrain_records(count: int, seed: str) -> tuple[list[Record], dict[str, world.Scene]]:
    """Stage-1 captions, and the scene of each image by its name."""
    records, scenes = [], {}
    for number in range(count):
        name = f"shapes/pretrain/{number:06d}.jpg"
        scenes[name] = scene = world.sample_scene(random.Random(f"{seed}/{number}"))
        turns = _turns([(world.DESCRIBE, world.describe(scene))], first="<image>\n")
        records.append({"id": f"pretrain-{number:06d}", "image": name, "conversations": turns})
    return records, scenes


def finetune_records(count: int, seed: str) -> tuple[list[Record], dict[str, world.Scene]]:
    """Stage-2 conversations, some without an image, and the scene of each image by its name."""
    records, scenes = [], {}
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        scene = world.sample_scene(rng)
        exchanges = [
            (q.text, q.answer) for q in world.sample_questions(scene, rng, rng.randint(*TURNS))
        ]
        record: Record = {"id": f"finetune-{number:06d}"}
        first = "<image>\n"
        if rng.random() < TEXT_ONLY:
            first = f"The image shows {world.describe(scene)}\n"
        else:
            record["image"] = f"shapes/finetune/{number:06d}.jpg"
            scenes[record["image"]] = scene
            if rng.random() < DESCRIBE_FIRST:
                exchanges = [(world.DESCRIBE, world.describe(scene)), *exchanges[: TURNS[1] - 1]]
        records.append({**record, "conversations": _turns(exchanges, first)})
    return records, scenes


def _turns(exchanges: list[tuple[str, str]], first: str) -> list[dict[str, str]]:
    turns = []
    for number, (question, answer) in enumerate(exchanges):
        turns.append({"from": "human", "value": question if number else first + question})
        turns.append({"from": "gpt", "value": answer})
    return turns


# --- evaluation -----------------------------------------------------------------------------------


def evaluation_scenes(count: int, seed: str) -> dict[str, world.Scene]:
    """Scenes by their image's name; every second one has a pair that no training picture shows."""
    return {
        f"{number:06d}.jpg": world.sample_scene(
            random.Random(f"{seed}/{number}"), held_out=bool(number % 2)
        )
        for number in range(count)
    }


def write_evaluation(folder: Path, scenes: dict[str, world.Scene], seed: str) -> None:
    """Writes the questions about the evaluation scenes in every format."""
    rng = random.Random(seed)
    questions = evaluation_questions(scenes, rng)
    write_json(folder / "scenes.json", {name: scene.to_json() for name, scene in scenes.items()})
    write_lines(
        folder / "vqa.jsonl",
        [
            {
                "question_id": number,
                "image": name,
                "text": question.text,
                "answer": question.answer,
                "kind": question.kind,
                "unseen_pair": question.unseen,
            }
            for number, (name, question) in enumerate(questions)
        ],
    )
    write_vqa(folder / "vqa", questions)
    write_gqa(folder / "gqa", questions)
    write_pope(folder / "pope", scenes, rng)
    write_captions(folder / "captions", scenes)


def evaluation_questions(
    scenes: dict[str, world.Scene], rng: random.Random
) -> list[tuple[str, world.Question]]:
    """A few questions a scene, each of another kind, the kinds about equally often.

    Questions about the unseen pair are preferred in the scenes that have one.
    """
    asked: Counter[str] = Counter()
    drawn = []
    for name, scene in scenes.items():
        options = []
        for kind in world.KINDS:
            tries = [
                world.sample_question(scene, rng, kind, unseen_negatives=True) for _ in range(6)
            ]
            found = sorted(filter(None, tries), key=lambda question: not question.unseen)
            options += found[:1]
        for question in sorted(options, key=lambda question: asked[question.kind])[
            :QUESTIONS_A_SCENE
        ]:
            asked[question.kind] += 1
            drawn.append((name, question))
    return drawn


def write_vqa(folder: Path, questions: list[tuple[str, world.Question]]) -> None:
    """VQAv2's questions and annotations."""
    header = {
        "info": {},
        "task_type": "Open-Ended",
        "data_type": "shapes",
        "data_subtype": "val",
        "license": {},
    }
    asked, annotations = [], []
    for number, (name, question) in enumerate(questions):
        image_id = int(Path(name).stem)
        asked.append({"image_id": image_id, "question": question.text, "question_id": number})
        answer = {"answer": question.answer, "answer_confidence": "yes"}
        answer_type = {"exist": "yes/no", "relation": "yes/no", "count": "number"}.get(
            question.kind, "other"
        )
        annotations.append(
            {
                "question_id": number,
                "image_id": image_id,
                "question_type": question.kind,
                "answer_type": answer_type,
                "multiple_choice_answer": question.answer,
                "answers": [
                    {**answer, "answer_id": person + 1} for person in range(ANSWERS_A_QUESTION)
                ],
            }
        )
    write_json(folder / "questions.json", {**header, "questions": asked})
    write_json(folder / "annotations.json", {**header, "annotations": annotations})


def write_gqa(folder: Path, questions: list[tuple[str, world.Question]]) -> None:
    """GQA's questions: a dictionary by question id."""
    types = {
        "exist": ("verify", "obj"),
        "relation": ("verify", "rel"),
        "place": ("query", "rel"),
        "count": ("query", "obj"),
    }
    groups = {
        "color": "color",
        "shape": "shape",
        "size": "size",
        "place": "place",
        "count": "count",
    }
    written = {}
    for number, (name, question) in enumerate(questions):
        structural, semantic = types.get(question.kind, ("query", "attr"))
        written[str(number)] = {
            "question": question.text,
            "imageId": Path(name).stem,
            "answer": question.answer,
            "fullAnswer": question.answer,
            "isBalanced": True,
            "types": {"structural": structural, "semantic": semantic, "detailed": question.kind},
            "groups": {"global": groups.get(question.kind), "local": f"shapes-{question.kind}"},
            "semantic": [{"operation": "select", "argument": question.kind, "dependencies": []}],
            "entailed": [str(number)],
            "equivalent": [str(number)],
            "annotations": {"question": {}, "answer": {}, "fullAnswer": {}},
        }
    write_json(folder / "testdev_balanced_questions.json", written)


def write_pope(folder: Path, scenes: dict[str, world.Scene], rng: random.Random) -> None:
    """POPE's three lists, and the question file over all of them; half of the labels are "no"."""
    pairs = [(color, shape) for color in world.COLORS for shape in world.SHAPES]
    popular = Counter(
        (thing.color, thing.shape) for scene in scenes.values() for thing in scene.things
    )
    everything = []
    for start, style in enumerate(("adversarial", "popular", "random")):
        rows: list[Record] = []
        for name, scene in scenes.items():
            present = [(thing.color, thing.shape) for thing in scene.things]
            absent = rng.sample(
                [pair for pair in pairs if pair not in present], len(pairs) - len(present)
            )
            if style == "popular":
                absent.sort(key=lambda pair: -popular[pair])
                absent = absent[: len(pairs) // 4]
            elif style == "adversarial":
                # The nearest miss: a color and a shape that are both there, though not together.
                absent.sort(
                    key=lambda pair: (
                        (scene.by_color(pair[0]) is None) + (scene.by_shape(pair[1]) is None)
                    )
                )
                absent = absent[: max(1, len(present) * (len(present) - 1))]
            for (color, shape), label in ((rng.choice(present), "yes"), (rng.choice(absent), "no")):
                text = f"Is there a {color} {shape}?"
                number = start * 10_000_000 + len(rows) + 1
                rows.append({"question_id": number, "image": name, "text": text, "label": label})
        write_lines(folder / "coco" / f"coco_pope_{style}.json", rows)
        everything += [{**row, "category": style} for row in rows]
    for row in everything:
        del row["label"]
    write_lines(folder / "llava_pope_test.jsonl", everything)


def write_captions(folder: Path, scenes: dict[str, world.Scene]) -> None:
    """COCO's caption file, the Karpathy list, and the question file."""
    captions = [
        (number, name, world.describe(scene)) for number, (name, scene) in enumerate(scenes.items())
    ]
    images = [{"id": int(Path(name).stem), "file_name": name} for _, name, _ in captions]
    annotations = [
        {"id": n, "image_id": int(Path(name).stem), "caption": text} for n, name, text in captions
    ]
    write_json(folder / "captions_val.json", {"images": images, "annotations": annotations})
    write_json(
        folder / "karpathy_test.json",
        [{"image": name, "caption": [text]} for _, name, text in captions],
    )
    asked = [{"question_id": n, "image": name, "text": world.DESCRIBE} for n, name, _ in captions]
    write_lines(folder / "questions.jsonl", asked)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for mixTraindata/ and eval/"
    )
    parser.add_argument("--scenes-pretrain", type=int, default=6400)
    parser.add_argument("--scenes-finetune", type=int, default=5120)
    parser.add_argument("--eval-scenes", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    make_data(args.out, args.scenes_pretrain, args.scenes_finetune, args.eval_scenes, args.seed)
    logger.info("Wrote the miniature world's data to %s", args.out)


if __name__ == "__main__":
    main()
