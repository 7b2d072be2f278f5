"""Fixtures shared by the tests: where the published code's numbers lie, and its tiny tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sqllava.checkpoint.load import assemble
from sqllava.encoding import add_image_token
from sqllava.model.adapters import Lora, Training, adapter_state, prepare_training
from sqllava.train.trainer import save_adapter

REPO = Path(__file__).resolve().parent.parent


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Several test processes hand their reports on as UTF-8, which cannot hold the half characters
    that some tests make the program log."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report


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
    tokenizer = AutoTokenizer.from_pretrained(golden / "vicuna-tiny", trust_remote_code=False)
    add_image_token(tokenizer)
    return tokenizer


@pytest.fixture(scope="session")
def adapter(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter directory over the tiny golden models; its texts are noise that rarely ends."""
    folder = tmp_path_factory.mktemp("adapter")
    model, processor = assemble(
        str(golden / "vicuna-tiny"), str(golden / "clip-tiny"), conversation_template="v1_sq"
    )
    training = Training(vision_lora=Lora(2, 4), language_lora=Lora(2, 4))
    trained = prepare_training(model, training)
    save_adapter(trained, adapter_state(trained), folder)
    processor.save_pretrained(folder)
    return folder
