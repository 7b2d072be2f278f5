"""A model's folder by its name: one that is here, or one that is fetched from the hub."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What training and other frameworks leave beside a model.
_NOT_NEEDED = ["checkpoint-*/*", "global_step*/*", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.pth"]


def local_folder(name: str | Path) -> Path:
    """The folder of a model that is named by its path, or by its id on the hub.

    Raises:
        FileNotFoundError: it is neither a folder nor a model that can be fetched.
    """
    folder = Path(name)
    if folder.exists() or not _HUB_ID.fullmatch(str(name)) or str(name).startswith("."):
        return folder
    try:
        return Path(snapshot_download(str(name), ignore_patterns=_NOT_NEEDED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{name}: no such folder, and no model of that id could be fetched: {reason}"
        ) from error
