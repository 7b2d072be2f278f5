"""What a saved folder holds so that transformers finds our classes where nothing imports them.

Servers, and scripts that import transformers alone, get them with `trust_remote_code=True`, and
without it a sentence in place of some other class.
"""

import os
from pathlib import Path
from typing import Any

REMOTE_CODE = "modeling_sqllava.py"
_TEXT = '''"""The model's classes for trust_remote_code; needs `pip install sqllava`."""

from sqllava import (  # noqa: F401
    SQLlavaConfig,
    SQLlavaForConditionalGeneration,
    SQLlavaModel,
    SQLlavaProcessor,
)
'''
AUTO_MAP = {
    auto: f"{REMOTE_CODE.removesuffix('.py')}.{name}"
    for auto, name in {
        "AutoConfig": "SQLlavaConfig",
        "AutoModel": "SQLlavaModel",
        "AutoModelForImageTextToText": "SQLlavaForConditionalGeneration",
        "AutoProcessor": "SQLlavaProcessor",
    }.items()
}


def write_remote_code(folder: str | os.PathLike) -> None:
    """Writes the module that `AUTO_MAP` names into a folder."""
    (Path(folder) / REMOTE_CODE).write_text(_TEXT)


class Portable:
    """A class that transformers finds through `AUTO_MAP`, however it was loaded."""

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """Does nothing: transformers would copy this package's source into what is saved."""
