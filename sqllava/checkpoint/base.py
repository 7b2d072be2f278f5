"""Whether an adapter's base is the one that it was trained on: token ids, sizes, the weights' hash.

Training records the hashes in sqllava_run.json; opening, merging and converting compare them.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, cast

from sqllava.checkpoint.parts import files_of, load_tokenizer, saved_tokenizer
from sqllava.checkpoint.published import read_json
from sqllava.checkpoint.stamp import sampled
from sqllava.model.card import RUN_FILE
from sqllava.model.config import SQLlavaConfig

logger = logging.getLogger(__name__)


def fingerprint(path: str) -> str | None:
    """A hash of a model's weight files alone; see `stamp.sampled`.

    Args:
        path: folder or id of a language model, a tower, or a whole model.

    Returns:
        None where there are no weight files.
    """
    digest = hashlib.sha256()
    files = sorted(set(files_of(path).values()))
    for file in files:
        digest.update(f"{file.name} {sampled(file)}\n".encode())
    return digest.hexdigest() if files else None


def base_record(config: SQLlavaConfig) -> dict[str, dict[str, str | None]]:
    """What sqllava_run.json says of the parts under an adapter: their paths and hashes."""
    return {
        part: {"path": path, "sha256": fingerprint(path)} for part, path in _parts(config).items()
    }


def _parts(config: SQLlavaConfig) -> dict[str, str]:
    return {
        "language_model": cast(str, config.base_language_model),
        "vision_tower": cast(str, config.base_vision_tower),
    }


def warn_of_another_base(folder: Path, config: SQLlavaConfig) -> None:
    """Warns for each part whose weights are not those that an adapter was trained on."""
    file = folder / RUN_FILE
    recorded = read_json(file).get("base") if file.is_file() else None
    for part, path in _parts(config).items():
        trained_on = recorded.get(part) if isinstance(recorded, dict) else None
        wanted = trained_on.get("sha256") if isinstance(trained_on, dict) else None
        if wanted is not None and (found := fingerprint(path)) != wanted:
            logger.warning(
                "%s was trained on another %s than %s (hash %.12s, here %.12s): its answers may "
                "be wrong; pass the one that it was trained on (%s)",
                *(folder, part.replace("_", " "), path, wanted, found),
                cast(dict[str, Any], trained_on).get("path"),
            )


def check_base(folder: Path, config: SQLlavaConfig) -> None:
    """Compares an adapter's base, and its tower, with those that it was trained on.

    Args:
        folder: an adapter directory, ours or published.
        config: of the model that the adapter goes into.

    Raises:
        ValueError: the base gives tokens other ids than training did.
    """
    own, base = read_json(folder / "config.json"), cast(str, config.base_language_model)
    wanted = own.get("image_token_index")
    if wanted is not None and wanted != config.image_token_index:
        raise ValueError(
            f"{folder} was trained with {wanted} as the id of <image>, but with the base {base} it "
            f"is {config.image_token_index}: the base's vocabulary was changed; pass base=..., the "
            "one that it was trained on"
        )
    if (folder / "tokenizer_config.json").is_file():
        ids = saved_tokenizer(folder).get_vocab()
        there = load_tokenizer(base).get_vocab()
        other = sorted(
            (number, token) for token, number in ids.items() if there.get(token) != number
        )
        if other:
            number, token = other[0]
            raise ValueError(
                f"{folder}: of its tokens {len(other)} have another id, or none, in the base "
                f"{base}, such as {json.dumps(token, ensure_ascii=False)}, {number} in training "
                f"and {there.get(token)} there; pass base=..., the one that it was trained on"
            )
    rows = (own.get("text_config") or own).get("vocab_size")
    if rows is not None and rows != config.text_config.vocab_size:
        logger.warning(
            "%s was trained on a base with %d embeddings, %s has %d: it is not the same base",
            *(folder, rows, base, config.text_config.vocab_size),
        )
    warn_of_another_base(folder, config)
