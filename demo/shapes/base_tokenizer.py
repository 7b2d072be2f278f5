"""The base models' tokenizer: Llama-2 style, and every word of the world is one piece."""

from __future__ import annotations

import io
import itertools
import json
import re
from pathlib import Path

import sentencepiece as spm
import world

# The texts of the conversation templates; the tokenizer must know their words as Vicuna's does.
TEMPLATE_TEXTS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions.",
    "Also, the artificial intelligence assistant is a curious virtual user. The virtual user asks "
    "complex questions that are relevant to the content in the image, for example, asking about "
    "background knowledge of the objects in the image, asking to discuss about events happening in "
    "the image, etc. Again, do not ask about uncertain details.",
    "USER: ASSISTANT: VUSER:",
    world.DESCRIBE,
    "The image shows",
    "Answer the question using a single word or phrase.",
)


def make_tokenizer(folder: Path) -> None:
    """Trains the tokenizer on the world's text and the templates' and writes it as Vicuna's is."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(_train(_words()))
    special = {
        token: {
            "content": content,
            "lstrip": False,
            "normalized": True,
            "rstrip": False,
            "single_word": False,
        }
        for token, content in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    }
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        **{name: {"__type": "AddedToken", **token} for name, token in special.items()},
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 2048,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", {**special, "pad_token": "<unk>"})


def _words() -> list[str]:
    """Every word as it is written after a space and, for the roles, also directly after `</s>`."""
    texts = list(TEMPLATE_TEXTS)
    scene = world.Scene(
        (world.Thing("small", "red", "circle", 0), world.Thing("large", "blue", "star", 4))
    )
    texts += [question.text for question in world.questions(scene)] + [world.describe(scene)]
    texts += list(
        itertools.chain(
            world.COLORS, world.SHAPES, world.SIZES, world.PLACES, world.NUMBERS, ("yes", "no")
        )
    )
    found = sorted({word for text in texts for word in re.findall(r"[A-Za-z]+", text)})
    return found


def _train(words: list[str]) -> bytes:
    """Trains BPE until every word is merged to one piece, whatever vocabulary that takes."""
    # A word begins with the dummy prefix but for those that follow a newline or `</s>`: these come
    # after a mark here, at which the trainer splits, and are rarer, so that both forms are learned.
    lines = words * 4 + [f".{word}" for word in words if word[0].isupper() or len(word) == 1] * 2
    lines += [".", ",", ":", "?", "'"] * 4
    size = 4096
    while True:
        model = io.BytesIO()
        try:
            spm.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type="bpe",
                vocab_size=size,
                character_coverage=1.0,
                normalization_rule_name="identity",
                add_dummy_prefix=True,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                byte_fallback=True,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=-1,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            # The trainer names the largest vocabulary that the words can fill.
            limit = re.search(r"value <= (\d+)", str(error))
            if limit is None:
                raise
            size = int(limit.group(1))
        else:
            return model.getvalue()


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
