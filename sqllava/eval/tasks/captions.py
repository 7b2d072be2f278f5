"""Captioning: COCO, Flickr30k, NoCaps and Conceptual Captions, scored by the COCO caption tool."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqllava.eval.metrics.captions import PUBLISHED_WORDS, caption_items, caption_metrics
from sqllava.eval.records import (
    Metrics,
    Row,
    by_question_id,
    grouped,
    join,
    mean,
    read_json,
    read_jsonl,
    text_of,
    write_jsonl,
)
from sqllava.eval.tasks.task import File, Inputs, Layout, Option, Task, read_llava_questions

# The prompt of the published question files is not known; this is TextCaps' in LLaVA's data.
PROMPT = "Provide a one-sentence caption for the provided image."
DOMAINS = ("in-domain", "near-domain", "out-domain")


@dataclass(frozen=True)
class Reference:
    """A picture's captions."""

    image: str
    captions: tuple[str, ...]
    domain: str | None = None

    @property
    def key(self) -> str:
        return image_key(self.image)


def image_key(name: str) -> str:
    """What a picture is called in all files: its COCO number, or its name without the ending."""
    last = Path(name).stem.split("_")[-1]
    return str(int(last)) if last.isdigit() else Path(name).stem


def read_references(path: Path, split: str = "test") -> list[Reference]:
    """Reads captions in any of the forms in which they are published.

    Args:
        path: a list of {image, caption} (the Karpathy files of BLIP), COCO's caption file (NoCaps
            too), Karpathy's dataset_*.json, or JSON lines with image and label or caption.
        split: which split of Karpathy's file.
    """
    if path.suffix == ".jsonl":
        return [_listed(number, row) for number, row in enumerate(read_jsonl(path))]
    content = read_json(path)
    if isinstance(content, list):
        return [_listed(number, row) for number, row in enumerate(content)]
    if "annotations" in content:
        return _of_coco(content)
    return [
        Reference(image["filename"], tuple(sentence["raw"] for sentence in image["sentences"]))
        for image in content["images"]
        if image["split"] == split
    ]


def _listed(number: int, row: Row) -> Reference:
    given = row.get("caption", row.get("label"))
    if given is None:
        raise ValueError(f"record {number}: expected a caption or a label, found {list(row)}")
    captions = (given,) if isinstance(given, str) else tuple(given)
    return Reference(row.get("image", str(number)), captions)


def _of_coco(content: Mapping[str, Any]) -> list[Reference]:
    captions: dict[Any, list[str]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    return [
        Reference(
            image.get("file_name", str(image["id"])),
            tuple(captions[image["id"]]),
            image.get("domain"),
        )
        for image in content["images"]
    ]


def judge(inputs: Inputs) -> list[Row]:
    """One item per picture, joined by its name; without a question file, by its number or id."""
    references = _wanted(read_references(inputs.annotations), inputs.options.get("domain"))
    by_key = {reference.key: reference for reference in references}
    if len(by_key) != len(references):
        raise ValueError(f"{inputs.annotations}: some pictures are there more than once")
    key_of = _keys(inputs, references)
    answers = join(
        inputs.answers, by_key, lambda row: key_of(by_question_id(row)), inputs.allow_missing
    )
    items = caption_items(
        {key: reference.captions for key, reference in by_key.items()},
        {key: text_of(row) for key, row in answers.items()},
        published=inputs.options.get("mode") == "published",
        max_words=int(inputs.options.get("max_words") or PUBLISHED_WORDS),
    )
    for item in items:
        row = answers[item["question_id"]]
        reference = by_key[item["question_id"]]
        item |= {"image": reference.image, "domain": reference.domain}
        item["prompt"] = row and row.get("prompt")
    return items


def _wanted(references: list[Reference], domain: str | None) -> list[Reference]:
    if not domain or domain == "all":
        return references
    kept = [reference for reference in references if reference.domain == domain]
    if not kept:
        raise ValueError(f"no picture is of the domain {domain!r}")
    return kept


def _keys(inputs: Inputs, references: Sequence[Reference]) -> Callable[[str], str]:
    """How a question's id leads to a picture."""
    if inputs.questions is not None:
        questions = read_llava_questions(inputs.questions)
        named = {str(question.question_id): question.image or "" for question in questions}
    elif isinstance(_content_of(inputs.annotations), list):
        named = {str(number): reference.image for number, reference in enumerate(references)}
    else:
        content = _content_of(inputs.annotations)
        named = {
            str(image.get("id", image.get("imgid"))): image.get("file_name")
            or image.get("filename")
            or str(image["id"])
            for image in content["images"]
        }

    def key(question_id: str) -> str:
        if question_id not in named:
            raise ValueError(f"no picture is known for question {question_id!r}: pass --questions")
        return image_key(named[question_id])

    return key


def _content_of(path: Path) -> Any:
    return read_jsonl(path) if path.suffix == ".jsonl" else read_json(path)


def summarize(items: Sequence[Row], options: Mapping[str, Any]) -> Metrics:
    """The corpus' scores, and those of each domain by itself, where the set has domains."""
    jars = options.get("spice_jars")
    folder = Path(jars) if jars else None
    metrics = caption_metrics(items, folder)
    domains = dict(grouped(items, "domain"))
    if len(domains) > 1:
        metrics["by_domain"] = {
            name: _domain_metrics(group, folder) for name, group in domains.items()
        }
    return metrics


def _domain_metrics(items: Sequence[Row], spice_jars: Path | None) -> Metrics:
    """A domain's scores by itself; each image's CIDEr within it goes into its item."""
    alone = [dict(item) for item in items]
    metrics = caption_metrics(alone, spice_jars)
    for item, copy in zip(items, alone, strict=True):
        item["cider_in_domain"] = copy["cider"]
    return metrics


def resample(items: Sequence[Row], options: Mapping[str, Any]) -> Metrics:
    """The metrics that are means over pictures; BLEU and METEOR are not.

    CIDEr's weights stay those of the whole set, or of the whole domain.
    """
    by_domain = {
        name: {
            "rouge_l": mean(item["rouge_l"] for item in group),
            "cider": mean(item["cider_in_domain"] for item in group),
        }
        for name, group in grouped(items, "domain")
        if "cider_in_domain" in group[0]
    }
    means = {name: mean(item[name] for item in items) for name in ("rouge_l", "cider")}
    return {**means, "by_domain": by_domain}


def prepare(source: Path, out: Path, options: Mapping[str, Any]) -> int:
    """Makes the question file from any of the forms of captions."""
    references = _wanted(read_references(source), options.get("domain"))
    rows = [_row(number, reference, options) for number, reference in enumerate(references)]
    write_jsonl(out, rows)
    return len(rows)


def _row(number: int, reference: Reference, options: Mapping[str, Any]) -> Row:
    text = options.get("prompt") or PROMPT
    return {"question_id": number, "image": Path(reference.image).name, "text": text}


def prepare_conceptual(source: Path, out: Path, options: Mapping[str, Any]) -> int:
    """Makes the question file, with the captions as labels, from the TSV of captions and addresses.

    Many of its addresses are dead: with --images only the pictures that are there are asked about.
    """
    pattern, folder = options.get("pattern") or "{:08d}.jpg", options.get("images")
    rows = []
    for number, line in enumerate(source.read_text(encoding="utf-8").split("\n")):
        caption = line.split("\t")[0]
        name = pattern.format(number)
        if not line.strip() or folder and not (Path(folder) / name).is_file():
            continue
        text = options.get("prompt") or PROMPT
        rows.append({"question_id": number, "image": name, "text": text, "label": caption})
    write_jsonl(out, rows)
    return len(rows)


PROMPT_OPTION = Option("--prompt", f"what to ask; scores depend on it ({PROMPT!r})", kind=str)
DOMAIN = Option("--domain", "NoCaps: score only this domain", "all", ("all", *DOMAINS), str)


def _task(
    name: str,
    title: str,
    layout: Layout,
    files: Iterable[File],
    options: tuple[Option, ...] = (),
    prepare: Callable[[Path, Path, Mapping[str, Any]], int] = prepare,
    prepare_options: tuple[Option, ...] = (),
) -> Task:
    return Task(
        name=name,
        title=title,
        layout=layout,
        files=tuple(files),
        prompt=PROMPT,
        metric="BLEU-1..4, ROUGE-L, CIDEr-D and METEOR of the COCO caption tool; SPICE with jars",
        headline=("cider",),
        scale=100,
        image_preparation="crop",
        max_new_tokens=1024,
        read_questions=read_llava_questions,
        judge=judge,
        summarize=summarize,
        resample=resample,
        prepare=prepare,
        prepare_options=(PROMPT_OPTION, *options, *prepare_options),
        options=(
            Option(
                "--mode",
                "captions as they are, or cleaned and cut as the published scorer does",
                "standard",
                ("standard", "published"),
                str,
            ),
            Option("--max-words", "where the published mode cuts", PUBLISHED_WORDS, kind=int),
            Option("--spice-jars", "folder with CoreNLP 3.6.0's jars; adds SPICE", kind=str),
            *options,
        ),
    )


_MADE = "`sqllava eval prepare` from the captions"
TASKS = (
    _task(
        "coco",
        "COCO captions (Karpathy test)",
        Layout("coco", "question3.jsonl", "val2014", "coco_karpathy_test.json"),
        [
            File("question3.jsonl", _MADE, "1 MB"),
            File("coco_karpathy_test.json", "BLIP's annotation files", "2 MB"),
            File("val2014/", "images.cocodataset.org: zips/val2014.zip", "6 GB"),
        ],
    ),
    _task(
        "flickr30k",
        "Flickr30k captions (Karpathy test)",
        Layout("flickr", "question3.jsonl", "flickr30k_images", "flickr30k_test.json"),
        [
            File("question3.jsonl", _MADE, "0.2 MB"),
            File("flickr30k_test.json", "BLIP's annotation files", "0.5 MB"),
            File("flickr30k_images/", "the Flickr30k authors, on request", "4 GB"),
        ],
    ),
    _task(
        "nocaps",
        "NoCaps (val)",
        Layout("nocaps", "question.jsonl", "images", "nocaps_val_4500_captions.json"),
        [
            File("question.jsonl", _MADE, "1 MB"),
            File("nocaps_val_4500_captions.json", "nocaps.org", "4 MB"),
            File("images/", "Open Images, by the addresses in the annotations", "1.3 GB"),
        ],
        (DOMAIN,),
    ),
    _task(
        "conceptual",
        "Conceptual Captions (val)",
        Layout("conceptual", "question3.jsonl", "images", "question3.jsonl"),
        [
            File("question3.jsonl", _MADE, "3 MB"),
            File("images/", "the addresses in Validation_GCC-1.1.0-Validation.tsv", "1.5 GB"),
        ],
        prepare=prepare_conceptual,
        prepare_options=(
            Option("--pattern", "a picture's name by its line number ({:08d}.jpg)", kind=str),
            Option("--images", "leave out pictures that are not in this folder", kind=str),
        ),
    ),
)
