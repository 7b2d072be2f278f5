"""What every room uses to say what is wrong: all faults at once, by name."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

_MAY_WANT_CODE = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)


@contextlib.contextmanager
def refused_code(path: str | Path) -> Iterator[None]:
    """Says what code of its own a folder or hub id wants to run, where transformers refuses it.

    Inside, everything of transformers' is called with `trust_remote_code=False`: left unset, it
    asks on standard input, and runs the code at a "y".
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        wanted = _wanted_code(Path(path))
        raise ValueError(
            f"{path} wants to run code of its own{f' ({wanted})' if wanted else ''}, and none is "
            "run here: name a model whose classes transformers has"
        ) from error


def _wanted_code(folder: Path) -> str:
    """The classes that a folder's files name in their `auto_map`."""
    found = []
    for file in _MAY_WANT_CODE:
        with contextlib.suppress(OSError, ValueError, AttributeError, KeyError, TypeError):
            classes = json.loads((folder / file).read_text(encoding="utf-8"))["auto_map"].values()
            found.append(f"{file}: {', '.join(map(str, classes))}")
    return "; ".join(found)


def raise_faults(faults: list[str], what: str) -> None:
    """Raises ValueError with the faults by name, if there are any."""
    if faults:
        shown = "\n  ".join(faults[:20]) + ("\n  ..." if len(faults) > 20 else "")
        raise ValueError(f"{what} ({len(faults)} faults):\n  {shown}")
