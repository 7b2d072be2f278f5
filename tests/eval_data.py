"""A small benchmark folder in LLaVA's layout: some records of each task, in official forms."""

import base64
import csv
import json
import random
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

REPO = Path(__file__).resolve().parent.parent
GOLDEN = REPO / "tests" / "fixtures" / "upstream-tiny"
Row = dict[str, Any]

WORDS = ["red", "dog", "left", "a cat", "two", "yes", "no", "the park"]


def lines(path: Path, rows: Iterable[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def dump(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def picture(path: Path, number: int = 0) -> None:
    """A picture of its own size and colors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = random.Random(number)
    size = rng.randint(30, 90), rng.randint(30, 90)
    color = tuple(rng.randrange(256) for _ in range(3))
    Image.new("RGB", size, color).save(path, "JPEG" if path.suffix != ".png" else "PNG")


def asked(number: int, image: str, text: str, suffix: str = "", **more: Any) -> Row:
    return {"question_id": number, "image": image, "text": text + suffix, **more}


def ten(*answers: str) -> list[Row]:
    """Ten annotators, who give the answers by turns."""
    return [
        {"answer": answers[n % len(answers)], "answer_confidence": "yes", "answer_id": n + 1}
        for n in range(10)
    ]


SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def write_vqav2(root: Path) -> None:
    folder = root / "vqav2"
    header = {"info": {}, "task_type": "Open-Ended", "data_subtype": "val2014", "license": {}}
    questions, annotations, rows = [], [], []
    for n in range(4):
        name = f"COCO_val2014_{n:012d}.jpg"
        picture(folder / "test2015" / name, n)
        question = {"image_id": n, "question": f"What color is it, {n}?", "question_id": 9000 + n}
        questions.append(question)
        annotations.append(
            {
                "question_id": 9000 + n,
                "image_id": n,
                "question_type": "what",
                "answer_type": ("yes/no", "number", "other")[n % 3],
                "multiple_choice_answer": "red",
                "answers": ten("red", "blue") if n else ten("red"),
            }
        )
        rows.append(asked(9000 + n, name, question["question"], SHORT, category="default"))
    dump(folder / "questions.json", {**header, "questions": questions})
    dump(folder / "annotations.json", {**header, "annotations": annotations})
    lines(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", rows)


def write_gqa(root: Path) -> None:
    folder, questions, rows = root / "gqa", {}, []
    for n in range(4):
        picture(folder / "data/images" / f"n{n}.jpg", n)
        questions[f"0{n}"] = {
            "question": f"Is it {WORDS[n]}?",
            "imageId": f"n{n}",
            "answer": WORDS[n],
            "isBalanced": True,
            "types": {"structural": "query" if n % 2 else "verify", "semantic": "attr"}
            | {"detailed": "x"},
            "groups": {"global": "color", "local": None},
            "semantic": [{"operation": "select", "argument": "it"}],
            "entailed": [f"0{n}"],
        }
        rows.append(asked(f"0{n}", f"n{n}.jpg", f"Is it {WORDS[n]}?", SHORT, category="default"))
    dump(folder / "data/testdev_balanced_questions.json", questions)
    lines(folder / "llava_gqa_testdev_balanced.jsonl", rows)


def write_vizwiz(root: Path) -> None:
    folder, entries, rows = root / "vizwiz", [], []
    suffix = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT
    for n in range(3):
        name = f"VizWiz_val_{n:08d}.jpg"
        picture(folder / "test" / name, n)
        entries.append(
            {
                "image": name,
                "question": "what IS this?",
                "answers": ten("Unanswerable" if n == 2 else "red"),
                "answer_type": "unanswerable" if n == 2 else "other",
                "answerable": int(n != 2),
            }
        )
        rows.append(asked(n, name, "What is this?", suffix, category="default"))
    dump(folder / "val.json", entries)
    dump(folder / "test.json", [{k: e[k] for k in ("image", "question")} for e in entries])
    lines(folder / "llava_test.jsonl", rows)


def write_scienceqa(root: Path) -> None:
    folder, problems, records = root / "scienceqa", {}, []
    for n in range(4):
        problems[str(n + 5)] = {
            "question": f"Which is {WORDS[n]}?",
            "choices": ["one", "two", "three"][: 2 + n % 2],
            "answer": n % 2,
            "hint": "Look." if n % 2 else "",
            "image": "image.png" if n < 2 else None,
            "grade": f"grade{5 + n}",
            "subject": ("natural science", "social science", "language science")[n % 3],
            "topic": "physics",
        }
        if n < 2:
            picture(folder / f"images/test/{n + 5}/image.png", n)
        options = "\n".join(
            f"{'ABC'[i]}. {c}" for i, c in enumerate(problems[str(n + 5)]["choices"])
        )
        text = ("Context: Look.\n" if n % 2 else "") + f"Which is {WORDS[n]}?\n" + options
        record: Row = {"id": str(n + 5)}
        if n < 2:
            record["image"] = f"{n + 5}/image.png"
            text = "<image>\n" + text
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "AB"[n % 2]}]
        records.append({**record, "conversations": turns})
    dump(folder / "problems.json", problems)
    dump(folder / "pid_splits.json", {"test": list(problems)})
    dump(folder / "llava_test_CQM-A.json", records)


def write_textvqa(root: Path) -> None:
    folder, data, rows = root / "textvqa", [], []
    tokens = {"a1": ["AB", "CD"], "b2": []}
    for n, (image, question) in enumerate(
        [("a1", "what is the brand?"), ("a1", "what color?"), ("b2", "what is the brand?")]
    ):
        picture(folder / f"train_images/{image}.jpg", n)
        data.append({"question_id": n, "image_id": image, "question": question})
        data[-1]["answers"] = [answer["answer"] for answer in ten("acme", "ab")]
        text = f"{question.capitalize()}\nReference OCR token: {', '.join(tokens[image])}"
        rows.append(asked(image, f"{image}.jpg", text, SHORT, category="default"))
    dump(folder / "TextVQA_0.5.1_val.json", {"data": data})
    dump(
        folder / "ocr.json", {"data": [{"image_id": i, "ocr_tokens": t} for i, t in tokens.items()]}
    )
    lines(folder / "llava_textvqa_val_v051_ocr.jsonl", rows)


def write_pope(root: Path) -> None:
    folder, everything = root / "pope", []
    for first, split in ((0, "adversarial"), (20_000_000, "popular"), (10_000_000, "random")):
        rows = []
        for n in range(4):
            name = f"COCO_val2014_{n:012d}.jpg"
            picture(folder / "val2014" / name, n)
            text = f"Is there a {split} dog {n} in the image?"
            rows.append(asked(n + 1, name, text, label="yes" if n % 2 else "no"))
            everything.append(asked(first + n + 1, name, text, SHORT, category=split))
        lines(folder / f"coco/coco_pope_{split}.json", rows)
    lines(folder / "llava_pope_test.jsonl", everything)


def write_mme(root: Path) -> None:
    folder, rows = root / "MME", []
    release = folder / "MME_Benchmark_release_version"
    for subtask, inner in (("artwork", True), ("color", False), ("code_reasoning", False)):
        for n in range(2):
            place = release / subtask / ("images" if inner else ".")
            picture(place / f"{n:04d}.jpg", n)
            pairs = [(f"Is it {subtask}?", "Yes"), (f"Is it  {n}?", "No")]
            text = "".join(f"{q} Please answer yes or no.\t{a}\n" for q, a in pairs)
            answers = release / subtask / ("questions_answers_YN" if inner else ".")
            answers.mkdir(parents=True, exist_ok=True)
            (answers / f"{n:04d}.txt").write_text(text)
            name = f"{subtask}/images/{n:04d}.jpg" if inner else f"{subtask}/{n:04d}.jpg"
            for question, _ in pairs:
                rows.append(
                    {
                        "question_id": name,
                        "image": name,
                        "text": " ".join(question.split()) + SHORT,
                        "category": subtask,
                    }
                )
    (release / "eval_tool/LaVIN").mkdir(parents=True)
    (release / "eval_tool/LaVIN/color.txt").write_text("not a question\n")
    lines(folder / "llava_mme.jsonl", rows)


def mmbench_rows() -> list[Row]:
    """Two questions: one with three turns and the options None and NA, one with two."""
    data = (GOLDEN / "images/0.png").read_bytes()
    image = base64.b64encode(data).decode()
    rows = []
    for base, options in ((241, ["None", "cat", "NA"]), (242, ["dog", "rabbit"])):
        for turn in range(len(options)):
            turned = [options[(i - turn) % len(options)] for i in range(len(options))]
            rows.append(
                {
                    "index": base + 1_000_000 * turn,
                    "question": f"Which is it, {base}?",
                    "hint": "nan" if base == 241 else 'A "hint"',
                    **dict(zip("ABCD", [*turned, "", ""], strict=False)),
                    "answer": "ABCD"[turned.index(options[1])],
                    "category": "object_localization",
                    "image": image if not turn else str(base),
                    "source": "x",
                    "l2-category": "finegrained",
                    "comment": "",
                    "split": "dev",
                }
            )
    return rows


def write_mmbench(root: Path, name: str = "mmbench_dev_20230712.tsv") -> None:
    path = root / "mmbench" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = mmbench_rows()
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def write_seed(root: Path) -> None:
    folder, questions, rows = root / "seed_bench", [], []
    for name, kind, number, answer in (
        ("1", "image", 1, "A"),
        ("2", "image", 1, "B"),
        ("v0", "video", 10, "C"),
    ):
        entry = {f"choice_{c}": f"{c} {WORDS[i]}" for i, c in enumerate("abcd")}
        entry |= {"answer": answer, "data_id": f"pic{name}", "data_type": kind}
        entry |= {"question": f"How, {name}?", "question_id": name, "question_type_id": number}
        questions.append(entry)
        image = f"SEED-Bench-image/pic{name}"
        if kind == "video":
            image = f"SEED-Bench-video-image/{number}_{name}.png"
        picture(folder / image)
        text = f"How, {name}?" + "".join(f"\n{c.upper()}. {entry[f'choice_{c}']}" for c in "abcd")
        rows.append(
            {
                "image": image,
                "text": text + LETTER,
                "category": "Scene Understanding" if number == 1 else "Action Recognition",
                "question_id": int(name) if name.isdigit() else name,
            }
        )
    types = {"Scene Understanding": 1, "Action Recognition": 10}
    dump(folder / "SEED-Bench.json", {"questions": questions, "question_type": types})
    lines(folder / "llava-seed-bench.jsonl", rows)


RULE = {"role": "Assistant", "prompt": "Rate both answers; two numbers in the first line."}


def write_llavabench(root: Path) -> None:
    folder = root / "llava-bench-in-the-wild"
    kinds = ("conv", "detail", "complex")
    questions = [
        asked(n, f"{n + 1:03d}.jpg", f"What is {WORDS[n]}?", category=kinds[n]) for n in range(3)
    ]
    for n in range(3):
        picture(folder / f"images/{n + 1:03d}.jpg", n)
    lines(folder / "questions.jsonl", questions)
    captions: list[Any] = ["A park.", ["A dog.", "A cat."], "Nothing."]
    lines(
        folder / "context.jsonl",
        [{"id": f"{n}", "image": f"{n + 1:03d}.jpg", "caption": captions[n]} for n in (2, 0, 1)],
    )
    lines(
        folder / "answers_gpt4.jsonl",
        [{"question_id": n, "text": f"It is {n}.", "answer_id": f"g{n}"} for n in (1, 2, 0)],
    )
    dump(folder / "rule.json", {f"llava_bench_{kind}": RULE for kind in kinds})


def write_mmvet(root: Path) -> None:
    folder = root / "mm-vet"
    capabilities = (["ocr", "math"], ["rec"], ["math", "ocr"], ["rec", "know", "gen"])
    entries = {
        f"v1_{n}": {
            "imagename": f"v1_{n}.png",
            "question": f"What is {WORDS[n]}?",
            "answer": "-1<AND>-5",
            "capability": capabilities[n],
        }
        for n in range(4)
    }
    for n in range(4):
        picture(folder / f"images/v1_{n}.png", n)
    dump(folder / "mm-vet.json", entries)
    rows = [asked(n, f"v1_{n}.png", f"What is {WORDS[n]}?", category="conv") for n in range(4)]
    lines(folder / "llava-mm-vet.jsonl", rows)


def write_qbench(root: Path) -> None:
    folder = root / "qbench"
    records = [
        {
            "type": n,
            "concern": n,
            "question": f"How is it, {n}?",
            "img_path": f"{n:05d}.jpg",
            "candidates": ["High", "Low", "Medium"],
            "correct_ans": "Low",
        }
        for n in range(3)
    ]
    for n in range(3):
        picture(folder / f"images_llvisionqa/{n:05d}.jpg", n)
    dump(folder / "llvisionqa_dev.json", records)
    dump(folder / "质衡-问答-验证集.json", records)


CAPTION = "Provide a one-sentence caption for the provided image."


def write_captions(root: Path) -> None:
    texts = [
        ["A dog runs.", "The dog, running!"],
        ["Two cats\rsleep.", ""],
        ["A red\u2028car", "car\t."],
    ]
    names = [
        "COCO_val2014_000000391895.jpg",
        "COCO_val2014_000000000042.jpg",
        "COCO_val2014_000000000007.jpg",
    ]
    for folder, images in (
        ("coco", "val2014"),
        ("flickr", "flickr30k_images"),
        ("nocaps", "images"),
        ("conceptual", "images"),
    ):
        for n, name in enumerate(names):
            picture(root / folder / images / name, n)
    listed = [{"image": f"val2014/{n}", "caption": t} for n, t in zip(names, texts, strict=True)]
    rows = [asked(n, name, CAPTION) for n, name in enumerate(names)]
    dump(root / "coco/coco_karpathy_test.json", listed)
    dump(root / "flickr/flickr30k_test.json", listed)
    lines(root / "coco/question3.jsonl", rows)
    lines(root / "flickr/question3.jsonl", rows)
    domains = ("in-domain", "near-domain", "near-domain")
    annotations = [
        {"id": 10 * n + i, "image_id": n, "caption": caption}
        for n, captions in enumerate(texts)
        for i, caption in enumerate(captions)
    ]
    images = [{"id": n, "file_name": name, "domain": domains[n]} for n, name in enumerate(names)]
    dump(
        root / "nocaps/nocaps_val_4500_captions.json",
        {"images": images, "annotations": annotations},
    )
    lines(root / "nocaps/question.jsonl", rows)
    labelled = [{**row, "label": texts[n][0]} for n, row in enumerate(rows)]
    lines(root / "conceptual/question3.jsonl", labelled)


def write_all(root: Path) -> Path:
    """Every task's data; returns the folder."""
    for writer in (
        *(write_vqav2, write_gqa, write_vizwiz, write_scienceqa, write_textvqa, write_pope),
        *(write_mme, write_mmbench, write_seed, write_llavabench, write_mmvet, write_qbench),
        write_captions,
    ):
        writer(root)
    write_mmbench(root, "mmbench_dev_cn_20231003.tsv")
    return root


def write_answers(
    path: Path, task: Any, questions: Path, texts: Sequence[str] | None = None
) -> Path:
    """Answers to all questions in our runner's form: the given texts by turns, or nothing."""
    from sqllava.eval.records import answer_row

    texts = texts or [""]
    return lines(
        path,
        [
            answer_row(question, texts[n % len(texts)], "model")
            for n, question in enumerate(task.read_questions(questions))
        ],
    )


def copy_tiny_model(folder: Path) -> Path:
    """A whole tiny model of ours, put together from the golden parts.

    Its matrices are made larger, so that what it says depends on what it is asked and shown.
    """
    import torch

    from sqllava.checkpoint.load import assemble

    model, processor = assemble(
        str(GOLDEN / "vicuna-tiny"), str(GOLDEN / "clip-tiny"), conversation_template="v1_sq"
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim == 2:
                weights.mul_(4.0)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
