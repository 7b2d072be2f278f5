"""Fixtures shared by the tests: where the published code's numbers lie, and its tiny tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sqllava.encoding import add_image_token

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def golden() -> Path:
    """Tiny models, data and numbers, all computed by the published code."""
    return REPO / "tests" / "fixtures" / "upstream-tiny"


@pytest.fixture(scope="session")
def golden_json(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "golden.json").read_text())


@pytest.fixture(scope="session")
def golden_records(golden: Path) -> dict[str, dict[str, Any]]:
    """The records behind the golden rows, by their id."""
    records = json.loads((golden / "conversations.json").read_text())
    return {record["id"]: record for record in records}


@pytest.fixture(scope="session")
def tokenizer(golden: Path) -> PreTrainedTokenizerBase:
    """1345 sentencepiece pieces of Llama-2's, with `<image>` added."""
    tokenizer = AutoTokenizer.from_pretrained(golden / "vicuna-tiny")
    add_image_token(tokenizer)
    return tokenizer
