"""Captioning: COCO, Flickr30k, NoCaps and Conceptual Captions, scored by the COCO caption tool."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqllava.eval.fields import Record, listed
from sqllava.eval.metrics.captions import PUBLISHED_WORDS, caption_items, caption_metrics
from sqllava.eval.records import (
    Metrics,
    NoAnswersError,
    Row,
    by_question_id,
    grouped,
    join,
    mean,
    open_text,
    read_json,
    read_lines,
    read_record,
    text_of,
    write_jsonl,
    write_text,
)
from sqllava.eval.tasks.task import (
    UPLOAD,
    File,
    Inputs,
    Layout,
    Option,
    Task,
    read_llava_questions,
    write_pretty,
)

logger = logging.getLogger(__name__)

# The prompt of the published question files is not known; this is TextCaps' in LLaVA's data.
PROMPT = "Provide a one-sentence caption for the provided image."
DOMAINS = ("in-domain", "near-domain", "out-domain")


@dataclass(frozen=True)
class Reference:
    """A picture's captions.

    Attributes:
        question_id: what a question about it is called, where there is no question file: its number
            in a list, its id in the other forms.
        captions: none in a split whose captions are not public.
        domain: of NoCaps.
    """

    image: str
    captions: tuple[str, ...]
    question_id: str
    domain: str | None = None

    @property
    def key(self) -> str:
        return image_key(self.image)


def image_key(name: str) -> str:
    """What a picture is called in all files: its COCO number, or its name without the ending."""
    last = Path(name).stem.split("_")[-1]
    is_number = last.isascii() and last.isdecimal()
    return (last.lstrip("0") or "0") if is_number else Path(name).stem


def read_references(path: Path, split: str = "test") -> list[Reference]:
    """Reads captions in any of the forms in which they are published.

    Args:
        path: a list of {image, caption} (the Karpathy files of BLIP), COCO's caption file (NoCaps
            too), Karpathy's dataset_*.json, or JSON lines with image and label or caption.
        split: which split of Karpathy's file.

    Raises:
        ValueError: it is none of these; the message says where.
    """
    if path.suffix == ".jsonl":
        found = [_listed(number, record) for number, record in enumerate(read_lines(path))]
    elif isinstance(content := read_json(path), list):
        records = listed(content, str(path))
        found = [_listed(number, record) for number, record in enumerate(records)]
    else:
        found = _of_file(read_record(path), split)
    if not found:
        raise ValueError(f"{path} holds no pictures")
    return found


def _listed(number: int, record: Record) -> Reference:
    name = "caption" if "caption" in record.row else "label"
    image = record.text("image") if "image" in record.row else str(number)
    if name not in record.row:
        raise record.fault("expected a caption or a label")
    several = isinstance(record.row[name], list)
    captions = record.texts(name) if several else [record.text(name)]
    return Reference(image, tuple(captions), str(number))


def _of_file(content: Record, split: str) -> list[Reference]:
    """The references in COCO's form, or in Karpathy's."""
    if "annotations" not in content.row and "images" not in content.row:
        raise content.fault("expected `images` and `annotations` of COCO, or Karpathy's `images`")
    images = content.records("images") if "images" in content.row else None
    if "annotations" in content.row or not any("sentences" in image.row for image in images or []):
        return _of_coco(content, images)
    splits = [image.text("split") for image in images or []]
    if split not in splits:
        raise ValueError(f"{content.where} has no split {split!r}; there are {sorted(set(splits))}")
    return [
        Reference(
            image.text("filename"),
            tuple(sentence.text("raw") for sentence in image.records("sentences")),
            str(image.id("imgid")) if "imgid" in image.row else image.text("filename"),
        )
        for image, own in zip(images or [], splits, strict=True)
        if own == split
    ]


def _of_coco(content: Record, images: list[Record] | None) -> list[Reference]:
    """As COCO's own reader: what is listed counts, and captions of other pictures do not.

    Without a list, every picture with a caption counts.
    """
    annotations = content.records("annotations") if "annotations" in content.row else []
    captions: dict[str, list[str]] = {}
    for annotation in annotations:
        name = str(annotation.id("image_id"))
        captions.setdefault(name, []).append(annotation.text("caption"))
    if images is None:
        return [Reference(name, tuple(texts), name) for name, texts in captions.items()]
    ids = [str(image.id("id")) for image in images]
    strange = captions.keys() - set(ids)
    if strange:
        logger.warning(
            "%s: captions of %d pictures that `images` does not list are left out, such as %s",
            *(content.where, len(strange), min(strange)),
        )
    return [
        Reference(
            image.optional_text("file_name") or name,
            tuple(captions.get(name, ())),
            name,
            image.optional_text("domain"),
        )
        for name, image in zip(ids, images, strict=True)
    ]


def judge(inputs: Inputs) -> list[Row]:
    """One item per picture, joined by its name; without a question file, by its number or id."""
    references = _wanted(read_references(inputs.annotations), inputs.options.get("domain"))
    _check_captions(inputs.annotations, references)
    by_key = _by_key(inputs.annotations, references)
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


def _check_captions(path: Path, references: Sequence[Reference]) -> None:
    """Checks that every picture has captions: COCO's tool stops at one that has none."""
    bare = [reference.image for reference in references if not reference.captions]
    if len(bare) == len(references):
        raise NoAnswersError(
            f"{path} has no captions: they are not public, and only the benchmark's server can "
            "score this split"
        )
    if bare:
        raise ValueError(
            f"{path}: {len(bare)} of {len(references)} pictures have no captions, such as "
            f"{bare[0]!r}: the COCO caption tool cannot score these; take them out of the file, "
            "and their answers out of the answers"
        )


def _by_key(path: Path, references: Sequence[Reference]) -> dict[str, Reference]:
    by_key: dict[str, Reference] = {}
    for reference in references:
        other = by_key.setdefault(reference.key, reference)
        if other is not reference:
            raise ValueError(f"{path}: {other.image!r} and {reference.image!r} are one picture")
    return by_key


def _keys(inputs: Inputs, references: Sequence[Reference]) -> Callable[[str], str]:
    """How a question's id leads to a picture."""
    if inputs.questions is None:
        named = {reference.question_id: reference.image for reference in references}
    else:
        questions = read_llava_questions(inputs.questions)
        named = {str(question.question_id): question.image or "" for question in questions}

    def key(question_id: str) -> str:
        if question_id not in named:
            source = inputs.questions or inputs.annotations
            more = ": pass --questions" * (inputs.questions is None)
            raise ValueError(f"{source}: no picture is known for question {question_id!r}{more}")
        return image_key(named[question_id])

    return key


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


def submit(inputs: Inputs, out: Path) -> None:
    """Writes COCO's result file, which NoCaps' and COCO's servers want: a caption by picture id.

    The id is the one in `images`; in lists it is the picture's number, or its name.
    """
    references = read_references(inputs.annotations)
    by_key = _by_key(inputs.annotations, references)
    key_of = _keys(inputs, references)
    answers = join(
        inputs.answers, by_key, lambda row: key_of(by_question_id(row)), forgiving=UPLOAD
    )
    numbered = isinstance(read_json(inputs.annotations), dict)
    rows = [
        {
            "image_id": _number(by_key[key].question_id if numbered else key),
            "caption": text_of(row),
        }
        for key, row in answers.items()
    ]
    write_text(out, write_pretty(rows))


def _number(name: str) -> int | str:
    return int(name) if name.isascii() and name.isdecimal() and len(name) < 20 else name


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
    with open_text(source, newline="\n") as file:
        lines = file.read().split("\n")
    rows = []
    for number, line in enumerate(lines):
        caption = line.rstrip("\r").split("\t")[0]
        name = _pictures_name(pattern, number)
        if not line.strip() or folder and not (Path(folder) / name).is_file():
            continue
        text = options.get("prompt") or PROMPT
        rows.append({"question_id": number, "image": name, "text": text, "label": caption})
    write_jsonl(out, rows)
    return len(rows)


def _pictures_name(pattern: str, number: int) -> str:
    try:
        return pattern.format(number)
    except (ValueError, LookupError) as error:
        raise ValueError(
            f"--pattern {pattern!r} names no picture ({error!r}): write it as {{:08d}}.jpg"
        ) from None


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
        submission="JSON list of {image_id, caption}, COCO's result form",
        submit=submit,
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
