"""SQ-LLaVA: a vision-language model that learns to ask about images as well as to answer.

Names are looked up on first use, so that importing the package loads nothing heavy. Its model is
known to transformers' Auto classes from the moment that both packages are imported, in any order.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqllava.ask.questioner import SelfQuestioner
    from sqllava.checkpoint.load import load
    from sqllava.model.config import SQLlavaConfig
    from sqllava.model.model import SQLlavaForConditionalGeneration, SQLlavaModel
    from sqllava.model.processor import SQLlavaProcessor

__version__ = "0.1.0"
__all__ = [
    "SQLlavaConfig",
    "SQLlavaForConditionalGeneration",
    "SQLlavaModel",
    "SQLlavaProcessor",
    "SelfQuestioner",
    "load",
    "register",
]
_HOMES = {
    "SQLlavaConfig": "sqllava.model.config",
    "SQLlavaForConditionalGeneration": "sqllava.model.model",
    "SQLlavaModel": "sqllava.model.model",
    "SQLlavaProcessor": "sqllava.model.processor",
    "SelfQuestioner": "sqllava.ask.questioner",
    "load": "sqllava.checkpoint.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sqllava' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def register() -> None:
    """Makes the model known to transformers' Auto classes.

    Importing the package sees to it; vLLM calls it as a plugin, in each of its processes.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    from sqllava.model.config import SQLlavaConfig
    from sqllava.model.model import SQLlavaForConditionalGeneration, SQLlavaModel
    from sqllava.model.processor import SQLlavaProcessor

    AutoConfig.register("sqllava", SQLlavaConfig, exist_ok=True)
    AutoModel.register(SQLlavaConfig, SQLlavaModel, exist_ok=True)
    AutoModelForImageTextToText.register(
        SQLlavaConfig, SQLlavaForConditionalGeneration, exist_ok=True
    )
    AutoProcessor.register(SQLlavaConfig, SQLlavaProcessor, exist_ok=True)


class _RegisteringLoader(Loader):
    """Loads transformers as its own loader does, and then registers the model."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        register()


class _AtTransformersImport(MetaPathFinder):
    """Waits for the first import of transformers."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


if "transformers" in sys.modules:
    register()
else:
    sys.meta_path.insert(0, _AtTransformersImport())
