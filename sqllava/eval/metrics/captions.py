"""Caption metrics: BLEU, ROUGE-L, CIDEr-D and METEOR of the COCO caption tool, and SPICE.

Captions -> (cleaned, in the published mode) -> PTB tokens -> scores. Every caption has its image's
id all the way; nothing is matched by position.
"""

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from sqllava.eval.metrics.java import MissingToolError, meteor, ptb_tokenize, spice
from sqllava.eval.records import Metrics, Row, mean

REFERENCE_WORDS = 50
PUBLISHED_WORDS = 20
_SPOKEN_MARKS = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))


def clean_caption(caption: str, max_words: int) -> str:
    """Cleans a caption as the published SQ-LLaVA scorer does: some marks out, and cut to length."""
    caption = caption.lower().translate(_SPOKEN_MARKS)
    caption = re.sub(r"\s{2,}", " ", caption).rstrip("\n").strip(" ")
    return " ".join(caption.split(" ")[:max_words])


def caption_items(
    references: Mapping[str, Sequence[str]],
    candidates: Mapping[str, str],
    published: bool = False,
    max_words: int = PUBLISHED_WORDS,
) -> list[Row]:
    """One item for each image, with tokenised captions.

    Args:
        references: the images' captions by their id.
        candidates: one caption each.
        published: clean and cut the captions first, as the published scorer does; otherwise they go
            to the tokenizer as they are.
        max_words: where the published mode cuts candidates.
    """
    if published:
        references = {
            name: [clean_caption(text, REFERENCE_WORDS) for text in texts]
            for name, texts in references.items()
        }
        candidates = {name: clean_caption(text, max_words) for name, text in candidates.items()}
    if not references:
        raise ValueError("there is no picture with captions to score")
    # Each in a run of its own, as the caption tool does: the tokenizer looks past a line's end, so
    # that a caption's last full stop can depend on the caption after it.
    golden = ptb_tokenize(references)
    said = ptb_tokenize({name: [candidates[name]] for name in references})
    return [
        {
            "question_id": name,
            "image": name,
            "prediction": candidates[name],
            "answers": list(references[name]),
            "tokens": said[name][0],
            "reference_tokens": golden[name],
        }
        for name in references
    ]


def caption_metrics(items: Sequence[Row], spice_jars: Path | None = None) -> Metrics:
    """The corpus' scores, as fractions (CIDEr: of 0 to 10); writes each image's into its item.

    Args:
        spice_jars: CoreNLP's folder; without it `spice` is None.
    """
    references = {item["question_id"]: item["reference_tokens"] for item in items}
    candidates = {item["question_id"]: item["tokens"] for item in items}
    metrics, each = plain_metrics(references, candidates)
    metrics["meteor"], each["meteor"] = meteor(references, candidates)
    metrics["spice"] = None
    if spice_jars is not None:
        each["spice"] = spice(references, candidates, spice_jars)
        metrics["spice"] = mean(each["spice"].values())
    for item in items:
        item.update({name: scores[item["question_id"]] for name, scores in each.items()})
    return metrics


def plain_metrics(
    references: Mapping[str, Sequence[str]], candidates: Mapping[str, str]
) -> tuple[Metrics, dict[str, dict[str, float]]]:
    """The metrics of tokenised captions that need no Java: the corpus', and each image's.

    CIDEr's weights come from the references of this very set, so that a subset's score is not the
    mean of its part in a larger set; of one image it is 0, as of references without a word.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError:
        raise MissingToolError("no pycocoevalcap: pip install 'sqllava[eval]'") from None
    names = list(references)
    golden = {name: list(references[name]) for name in names}
    said = {name: [candidates[name]] for name in names}
    with contextlib.redirect_stdout(io.StringIO()):  # the scorers print
        bleu, each_bleu = Bleu(4).compute_score(golden, said, verbose=0)
        rouge, each_rouge = Rouge().compute_score(golden, said)
        cider, each_cider = 0.0, [0.0] * len(names)
        if any(text.split() for texts in golden.values() for text in texts):
            cider, each_cider = Cider().compute_score(golden, said)
    metrics = {f"bleu_{n}": float(score) for n, score in enumerate(bleu, 1)}
    metrics |= {"rouge_l": float(rouge), "cider": float(cider)}
    each = {"bleu_4": each_bleu[3], "rouge_l": each_rouge, "cider": each_cider}
    return metrics, {
        metric: {name: float(score) for name, score in zip(names, scores, strict=True)}
        for metric, scores in each.items()
    }
