"""What tells one file, or one model, from another whatever its name: a hash of what it holds.

A run writes down the stamps of all that it was made from (`train/output.py`).
"""

import hashlib
import os
from pathlib import Path

from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

_BLOCK = 1 << 20
# Of a larger file, blocks spread over it are read: another training changes a weight file all over.
_READ_WHOLE = 64 << 20
_SAMPLES = 256
_SAMPLE = 16 << 10
# What a model is made of; beside it lie logs, cards and records of runs.
_OF_A_MODEL = (
    "*.safetensors",
    "*.bin",
    "config.json",
    "adapter_config.json",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "p*processor_config.json",
)
_NOT_OF_A_MODEL = ("training_args.bin", "optimizer.bin", "scheduler.bin")


def stamp_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sampled(path: Path) -> str:
    """SHA-256 of a file, or of the size of a large one and blocks spread over it."""
    size = path.stat().st_size
    if size <= _READ_WHOLE:
        return stamp_file(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as handle:
        for number in range(_SAMPLES):
            handle.seek((size - _SAMPLE) * number // (_SAMPLES - 1), os.SEEK_SET)
            digest.update(handle.read(_SAMPLE))
    return digest.hexdigest()


def stamp_model(name: str) -> str | None:
    """What tells a model from another: for a folder a hash of its weights, tokenizer and configs,
    for an id of the hub its commit; None if it cannot be found.

    Args:
        name: a folder, a file in one (as `mm_projector.bin`), or an id.
    """
    path = Path(name)
    if path.is_file():
        path = path.parent
    if path.is_dir():
        return _stamp_folder(path)
    try:
        return f"commit {extract_commit_hash(cached_file(name, 'config.json'), None)}"
    except OSError:
        return None


def _stamp_folder(folder: Path) -> str:
    """From the same files the same hash, wherever they lie; subfolders count (`Vit-lora/`), but for
    checkpoints."""
    digest = hashlib.sha256()
    places = [folder, *(place for place in folder.glob("*/") if _is_part(place))]
    files = {f for place in places for kind in _OF_A_MODEL for f in place.glob(kind) if f.is_file()}
    for file in sorted(files):
        if file.name not in _NOT_OF_A_MODEL:
            digest.update(f"{file.relative_to(folder)} {sampled(file)}\n".encode())
    return digest.hexdigest()


def _is_part(folder: Path) -> bool:
    return folder.is_dir() and not folder.name.startswith((".", "checkpoint-", "runs"))
